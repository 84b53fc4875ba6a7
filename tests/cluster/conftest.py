"""Two nodes with the everything server, and a look into their database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from tests.harness.cluster import RunningNode, Tables, cluster, everything, tables_of


@pytest.fixture
async def pair(database: str) -> AsyncIterator[Sequence[RunningNode]]:
    """Two nodes; the tests open their sessions on the first, so that one is the owner."""
    async with cluster(database, everything, 2) as nodes:
        yield nodes


@pytest.fixture
async def tables(database: str) -> AsyncIterator[Tables]:
    """The test's database."""
    async with tables_of(database) as tables:
        yield tables
