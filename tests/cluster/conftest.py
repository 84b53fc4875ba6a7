"""Two nodes with the everything server, shared by the tests of a module, and a look into their database.

A module that uses ``pair`` runs its tests in one event loop: ``pytestmark = pytest.mark.asyncio(loop_scope="module")``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest_asyncio
from pytest_postgresql.executors import NoopExecutor

from tests.conftest import temporary_database
from tests.harness.cluster import RunningNode, Tables, cluster, everything, tables_of


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_database(template: NoopExecutor) -> AsyncIterator[str]:
    """The address of a migrated database of the module's own."""
    async for address in temporary_database(template.template_dbname):
        yield address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(shared_database: str) -> AsyncIterator[Sequence[RunningNode]]:
    """Two nodes; the tests open their sessions on the first, so that one is the owner."""
    async with cluster(shared_database, everything, 2) as nodes:
        yield nodes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tables(shared_database: str) -> AsyncIterator[Tables]:
    """The database of ``pair``."""
    async with tables_of(shared_database) as tables:
        yield tables
