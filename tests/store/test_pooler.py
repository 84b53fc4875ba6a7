"""A real pgbouncer before PostgreSQL: migrations tell its modes apart, and nodes do without what it takes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pgmcp.clock import Clock
from pgmcp.errors import SchemaError, SettingsError
from pgmcp.settings import Settings
from pgmcp.store.commands import views
from pgmcp.store.connection.settings import PLANS, STARTUP
from pgmcp.store.database import Database
from pgmcp.store.schema import migrations, revisions
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything
from tests.harness.pooler import pooler


@pytest.fixture
def pooled(empty_database: str) -> Iterator[Callable[[str], str]]:
    """Puts a pooler of the given mode before the database and returns the DSN through it."""
    with ExitStack() as stack:
        yield lambda mode: stack.enter_context(pooler(empty_database, mode))


def test_a_transaction_pooler_is_refused_for_migrations_but_not_for_reading(
    empty_database: str, pooled: Callable[[str], str]
) -> None:
    dsn = pooled("transaction")
    with pytest.raises(SchemaError, match="Migrations need a direct connection"):
        migrations.upgrade(dsn, "pgmcp")
    assert migrations.current(dsn, "pgmcp") is None
    migrations.upgrade(empty_database, "pgmcp")
    assert views.fetch(dsn, "pgmcp", "live_nodes") == []
    assert migrations.current(dsn, "pgmcp") == revisions.head()


def test_a_session_pooler_will_do(pooled: Callable[[str], str]) -> None:
    dsn = pooled("session")
    migrations.upgrade(dsn, "pgmcp")
    assert migrations.check(dsn, "pgmcp") == []


async def test_a_node_says_that_it_needs_postgresql_itself_besides_a_pooler(database: str) -> None:
    ignored = f"ignore_startup_parameters = {','.join(STARTUP | PLANS)}"
    with pooler(database) as strict, pooler(database, more=ignored) as lenient:
        for urls in ({}, {"listen_url": strict}, {"listen_url": lenient}):
            for address in (strict, lenient):
                node = Database(Settings(database_url=address, **urls), Clock())
                with pytest.raises(SettingsError, match=r"is a pooler.*--listen-url"):
                    await node.open()
                await node.close()


async def test_nodes_work_through_a_transaction_pooler(empty_database: str, pooled: Callable[[str], str]) -> None:
    """Everything but the line goes through it: no statement cache, no startup parameters, wake-ups still heard."""
    dsn = pooled("transaction")
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
    async with (
        cluster(dsn, everything, 2, listen_url=empty_database, poll=30.0) as nodes,
        RawSession() as session,
    ):
        await session.open(nodes[0].url, nodes[1].url)
        for turn, node in enumerate([*nodes, *nodes, *nodes], 1):
            result = await session.call_tool(node.url, "count")
            assert result["structuredContent"] == {"result": turn}
        slow = await session.request(
            nodes[1].url, "tools/call", {"name": "slow", "arguments": {"seconds": 0.2, "steps": 4}}
        )
        await slow.rest()
        assert "result" in slow.messages[-1]
        assert (await session.delete(nodes[1].url)).status == 200
