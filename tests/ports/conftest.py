"""Every test here runs on PostgreSQL and on the ports in memory: what it says is the port's guarantee."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.harness.stores import opened
from tests.ports.benches import Bench, MemoryBench, Pair, TableBench


@pytest.fixture(params=["memory", "postgres"])
async def bench(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Bench]:
    """A cluster's database."""
    async with AsyncExitStack() as stack:
        yield MemoryBench() if request.param == "memory" else await TableBench.on(stack, database)


@pytest.fixture
async def pair(bench: Bench) -> Pair:
    """Two nodes, and a session of the first."""
    one, two = await bench.node(), await bench.node()
    return Pair(bench, one, two, await opened(one))
