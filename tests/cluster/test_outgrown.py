"""A node whose schema is newer, older or gone says so, at once and once, and goes on when it fits again."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest

from pgmcp.store.schema import migrations
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, cluster, everything, tables_of
from tests.harness.waiting import eventually


async def readiness(node: RunningNode) -> tuple[int, str]:
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        answer = await http.get(f"{node.url}/readyz")
        return answer.status_code, answer.json()["status"]


async def test_a_running_node_learns_that_the_database_needs_a_newer_build(database: str) -> None:
    async with cluster(database, everything, 1, idle_poll=0.1) as [node], tables_of(database) as tables:

        async def is_(*wanted: object) -> bool:
            return await readiness(node) == wanted

        assert await is_(200, "ready")
        await tables.execute("update pgmcp.schema_range set needs = '9999'")
        await eventually(lambda: is_(503, "schema"), "the node has learnt of it")
        first = node.incarnation.node_id
        await tables.execute("update pgmcp.nodes set state = 'dead'")
        await eventually(lambda: node.present is None, "the node is fenced")
        await eventually(lambda: is_(503, "schema"), "it may not join again")
        assert await tables.value("select count(*) from pgmcp.nodes") == 1
        await tables.execute("update pgmcp.schema_range set needs = '0001'")
        await eventually(lambda: is_(200, "ready"), "it joins as soon as it fits")
        assert node.incarnation.node_id != first


async def test_a_schema_that_is_older_or_gone_is_an_error_and_not_ready(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    soon: dict[str, Any] = {"idle_poll": 0.1, "renew": 0.1, "poll": 0.2}
    async with (
        cluster(database, everything, 1, **soon) as [node],
        tables_of(database) as tables,
        RawSession() as client,
    ):

        async def is_(*wanted: object) -> bool:
            return await readiness(node) == wanted

        def errors() -> list[str]:
            return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]

        await client.open(node.url)
        newest = await tables.value("select version_num from pgmcp.alembic_version")
        await tables.execute("update pgmcp.alembic_version set version_num = '0016'")
        await eventually(lambda: is_(503, "schema"), "it is older")
        assert [line.startswith("the schema does not fit this node any more: Schema pgmcp is at") for line in errors()]
        await tables.execute(f"update pgmcp.alembic_version set version_num = '{newest}'")
        await eventually(lambda: is_(200, "ready"), "it fits again")
        caplog.clear()
        await tables.execute("drop schema pgmcp cascade")
        await eventually(lambda: is_(503, "schema"), "it is gone")
        await asyncio.to_thread(migrations.upgrade, database, "pgmcp")
        await eventually(lambda: is_(200, "ready"), "the node is back", 20)
        gone = [line for line in errors() if line.startswith("the schema is gone")]
        assert len(gone) == 1
        assert "Restore them, or run `pgmcp db upgrade`" in gone[0]
        assert "line to PostgreSQL" not in caplog.text, "that has not been lost"
        assert "this node joined again, as" in caplog.text
        loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(loud) <= 8, [record.getMessage() for record in loud]
