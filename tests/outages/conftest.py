"""A database of a module's own, and a look into it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from pytest_postgresql.executors import NoopExecutor

from tests.conftest import temporary_database
from tests.harness.cluster import Tables, tables_of
from tests.outages.ledger import Ledger


@pytest.fixture
async def second_database(template: NoopExecutor) -> AsyncIterator[str]:
    """The address of one more migrated database."""
    async for address in temporary_database(template.template_dbname):
        yield address


@pytest.fixture
async def tables(database: str) -> AsyncIterator[Tables]:
    """The test's database, past any proxy."""
    async with tables_of(database) as tables:
        yield tables


@pytest.fixture
async def ledger() -> Ledger:
    """What really ran."""
    return Ledger()
