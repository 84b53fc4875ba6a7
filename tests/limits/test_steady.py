"""Steady load for as long as one likes: what is kept is what the retention says, and no more."""

from __future__ import annotations

import asyncio

import pytest

from pgmcp.node import incarnation
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

CALLS = 150
LATE = 5.0  # seconds: the retention, the pause between two sweeps, and patience with a machine that others use
OVERDUE = """
select (select count(*) from pgmcp.streams where closed_at < clock_timestamp() - make_interval(secs => $1))
     + (select count(*) from pgmcp.requests where finished_at < clock_timestamp() - make_interval(secs => $1))
     + (select count(*) from pgmcp.events where stored_at < clock_timestamp() - make_interval(secs => $1))
"""


async def test_tables_do_not_grow_under_steady_load(
    database: str, talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incarnation, "EVERY_SECONDS", 0.5)
    made, working = 0, True

    async def work(urls: list[str]) -> None:
        nonlocal made
        async with RawSession() as session:
            await session.open(urls[0])
            listening = await session.get(urls[1])
            while working:
                await session.call_tool(urls[made % 2], "note", first=made, count=1)
                await session.notify(urls[0], "notifications/roots/list_changed")
                await listening.message("notifications/message")
                made += 1

    async with cluster(database, talker, 2, retention=0.5) as nodes, tables_of(database) as tables:
        urls = [node.url for node in nodes]
        tasks = [asyncio.create_task(work(urls)) for _ in range(3)]
        try:
            for _ in range(4):
                before = made
                await eventually(lambda: made >= before + CALLS or any(task.done() for task in tasks), "calls", 60)  # noqa: B023
                await eventually(lambda: nothing(tables), "everything that is overdue has gone, under load", 20)
                assert not any(task.done() for task in tasks)
        finally:
            working = False
            await asyncio.gather(*tasks)
        assert made >= 4 * CALLS


async def nothing(tables: Tables) -> bool:
    return not await tables.value(OVERDUE, LATE)
