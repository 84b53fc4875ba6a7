"""Retention counts from delivery: what a client has just been sent it can have again, however long it had waited."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pgmcp.clock import Ids
from pgmcp.store.retention import Retention
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

both = pytest.mark.parametrize("edge", [0, 1])
RETENTION = 300
TIMES = {
    "streams": ("closed_at", "created_at", "released_at", "marked_at"),
    "requests": ("accepted_at", "claimed_at", "finished_at"),
    "events": ("stored_at",),
}
NOTES = "select count(*) from pgmcp.events where topic is not null"
CLOSED = """select count(*) from pgmcp.streams where closed and id = (
    select stream from pgmcp.requests where rpc_id = '"c"'
)"""
SINKS = "select count(*) from pgmcp.streams where sink is not null"


async def pass_by(tables: Tables, seconds: float) -> None:
    """Let time pass, in the database alone."""
    for table, columns in TIMES.items():
        changes = ", ".join(f"{column} = {column} - make_interval(secs => $1)" for column in columns)
        await tables.execute(f"update pgmcp.{table} set {changes}", seconds)


async def swept(nodes: Sequence[RunningNode]) -> None:
    for node in nodes:
        await Retention(node.database, Ids()).prune()  # it knows of no earlier sweep


async def let_go(tables: Tables) -> None:
    async def nobody() -> bool:
        return bool(await tables.value(SINKS) == 0)

    await eventually(nobody, "the streams are let go")


@both
async def test_what_waited_for_long_can_be_had_again_after_its_delivery(
    database: str, talker: Talker, edge: int
) -> None:
    async with (
        cluster(database, talker, 2, retention=RETENTION) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        base, other = nodes[edge].url, nodes[1 - edge].url
        await session.call_tool(base, "note", first=0, count=2)
        await let_go(tables)
        await pass_by(tables, RETENTION + 100)
        await swept(nodes)
        listening = await session.get(base)
        primed = (await listening.event()).id
        await listening.message("notifications/message")
        await listening.close()  # and who knows what of the rest has arrived
        await let_go(tables)
        await swept(nodes)
        for seconds in (1, RETENTION - 50):
            await pass_by(tables, seconds)
            await swept(nodes)
            resumed = await session.get(other, primed)
            assert resumed.status == 200
            got = [(await resumed.message("notifications/message"))["params"]["data"] for _ in range(2)]
            assert got == ["0", "1"]
            await resumed.close()
            await let_go(tables)
        await pass_by(tables, RETENTION)
        await swept(nodes)
        assert (await session.get(other, primed)).status == 204
        assert await tables.value(NOTES) == 0


@both
async def test_delivered_events_go_while_their_listener_stays(database: str, talker: Talker, edge: int) -> None:
    async with (
        cluster(database, talker, 2, retention=RETENTION) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        listening = await session.get(nodes[edge].url)
        for turn in range(4):
            await session.call_tool(nodes[1 - edge].url, "note", first=10 * turn, count=3)
            for _ in range(3):
                await listening.message("notifications/message")
            await swept(nodes)
            assert await tables.value(NOTES) == 3, "those that were delivered before have gone"
            await pass_by(tables, RETENTION + 1)
        await swept(nodes)
        assert await tables.value(NOTES) == 0
        await session.call_tool(nodes[1 - edge].url, "note", first=99, count=1)
        assert (await listening.message("notifications/message"))["params"]["data"] == "99"


@both
async def test_an_answer_that_was_fetched_late_can_be_fetched_again(database: str, talker: Talker, edge: int) -> None:
    async with (
        cluster(database, talker, 2, retention=RETENTION) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        base, other = nodes[edge].url, nodes[1 - edge].url
        flood = {"name": "flood", "arguments": {"count": 2, "size": 1}}
        call = await session.request(base, "tools/call", flood, request_id="c")
        cursor = (await call.event()).id
        await call.close()
        await let_go(tables)
        await eventually(lambda: tables.value(CLOSED), "it is answered")
        for _ in range(3):  # a client whose connections break, again and again
            await pass_by(tables, RETENTION - 20)
            await swept(nodes)
            resumed = await session.get(other, cursor)
            assert resumed.status == 200
            await resumed.response("c")
            await let_go(tables)
        await pass_by(tables, RETENTION + 1)
        await swept(nodes)
        assert (await session.get(base, cursor)).status == 204


async def test_a_client_that_comes_again_and_again_keeps_nothing_for_ever(database: str, talker: Talker) -> None:
    async with (
        cluster(database, talker, 1, retention=RETENTION) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        note = {"name": "note", "arguments": {"first": 0, "count": 1}}
        call = await session.request(nodes[0].url, "tools/call", note)
        cursor = (await call.event()).id
        await call.rest()
        await let_go(tables)
        await tables.execute("update pgmcp.streams set closed_at = closed_at - interval '1 hour' where closed")
        await swept(nodes)
        assert (await session.get(nodes[0].url, cursor)).status == 204


async def test_an_answer_that_nobody_fetches_goes(database: str, talker: Talker) -> None:
    async with (
        cluster(database, talker, 1, retention=RETENTION) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        hold = {"name": "hold", "arguments": {}}
        call = await session.request(nodes[0].url, "tools/call", hold, request_id="c")
        await call.close()
        await let_go(tables)
        await pass_by(tables, RETENTION + 100)  # it runs for long
        talker.release.set()
        await eventually(lambda: tables.value(CLOSED), "it is answered")
        await swept(nodes)
        assert await tables.value(CLOSED) == 1
        await pass_by(tables, RETENTION + 1)
        await swept(nodes)
        assert await tables.value("select count(*) from pgmcp.streams where kind = 'request'") == 0
