"""Where there are too many sessions, one that nobody uses makes room; who has none that may, is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import pytest
from mcp.server.mcpserver import MCPServer

from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

SINKS = "select count(*) from pgmcp.streams where sink is not null"
HOLD = {"name": "hold", "arguments": {}}


@pytest.fixture
def of() -> Callable[[str], RawSession]:
    return lambda who: RawSession(headers={"authorization": f"Bearer {who}"})


@pytest.fixture
def holding(private: Callable[[], MCPServer]) -> Callable[[], MCPServer]:
    """A server that wants to know who calls, with a tool that runs for as long as the test."""

    async def hold() -> str:
        await asyncio.Event().wait()
        return ""

    def make() -> MCPServer:
        server = private()
        server.tool()(hold)
        return server

    return make


async def over(session: RawSession, base: str) -> bool:
    return (await session.request(base, "ping")).status == 404


async def test_a_callers_session_that_was_used_longest_ago_makes_room(
    database: str, holding: Callable[[], MCPServer], of: Callable[[str], RawSession]
) -> None:
    async with (
        cluster(database, holding, 2, max_sessions_per_caller=4) as nodes,
        tables_of(database) as tables,
        of("ada") as listening,
        of("ada") as working,
        of("ada") as early,
        of("ada") as late,
        of("ada") as more,
        of("ada") as last,
        of("bob") as other,
    ):
        here, there = nodes[0].url, nodes[1].url
        await other.open(here)
        for session in (listening, working, early, late):
            await session.open(here)
        stream = await listening.get(there)
        call = await working.request(there, "tools/call", HOLD)
        await early.call(there, "ping")
        assert (await late.call(there, "ping"))["result"] == {}
        assert (await early.call(here, "ping"))["result"] == {}  # so it is the later one
        await eventually(lambda: carried(tables, 2), "only the stream and the call are carried")
        await more.open(there)
        for node in nodes:
            await eventually(partial(over, late, node.url), "the one unused for longest is over", 1)
        await eventually(lambda: nodes[0].incarnation.host.sessions == 4, "its owner has heard of it")
        await eventually(lambda: carried(tables, 2), "only the stream and the call are carried")
        await last.open(here)
        assert await over(early, there)
        for session in (listening, working, more, last, other):
            assert (await session.call(there, "ping"))["result"] == {}
        assert await tables.value("select count(*) from pgmcp.sessions") == 5
        await stream.close()
        await call.close()


async def carried(tables: Tables, streams: int) -> bool:
    return bool(await tables.value(SINKS) == streams)


async def test_a_caller_whose_sessions_are_all_in_use_is_refused(
    database: str, holding: Callable[[], MCPServer], of: Callable[[str], RawSession]
) -> None:
    async with (
        cluster(database, holding, 2, max_sessions_per_caller=2) as nodes,
        tables_of(database) as tables,
        of("ada") as listening,
        of("ada") as working,
        of("ada") as more,
    ):
        for session in (listening, working):
            await session.open(nodes[0].url)
        stream = await listening.get(nodes[1].url)
        call = await working.request(nodes[1].url, "tools/call", HOLD)
        for node in nodes:
            refused = await more.initialize(node.url)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert "All 2 sessions" in refused.json()["error"]["message"]
        await stream.close()
        await eventually(lambda: carried(tables, 1), "the stream is let go")
        await more.open(nodes[1].url)
        assert await over(listening, nodes[0].url)
        await call.close()


async def test_the_anonymous_callers_of_one_address_make_room_for_each_other(database: str) -> None:
    """One that opens sessions without end fills nobody's place but its own."""

    def at(address: str) -> RawSession:
        return RawSession(headers={"x-forwarded-for": address})

    async with (
        cluster(database, lambda: MCPServer("open"), 2, max_sessions=4, max_sessions_per_caller=2) as nodes,
        tables_of(database) as tables,
        at("10.0.0.1") as flood,
        at("2001:db8::1") as one,
        at("2001:db8::2") as two,
    ):
        for number in range(6):
            flood.session_id = None
            await flood.open(nodes[number % 2].url)
        for session in (one, two):  # of one /64
            await session.open(nodes[0].url)
            assert (await session.call(nodes[1].url, "ping"))["result"] == {}
        where = "select address, count(*) from pgmcp.sessions group by address order by address"
        assert [tuple(row) for row in await tables.rows(where)] == [("10.0.0.1", 2), ("2001:db8::/64", 2)]
        streams = [await session.get(nodes[1].url) for session in (one, two)]
        async with at("2001:db8::3") as three:
            refused = await three.initialize(nodes[0].url)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            async with RawSession(path="/sse", headers={"x-forwarded-for": "2001:db8::4"}) as older:
                assert (await older.get(nodes[1].url)).status == 429
        for stream in streams:
            await stream.close()


async def test_the_address_of_a_caller_with_a_name_is_not_kept(
    database: str, holding: Callable[[], MCPServer], of: Callable[[str], RawSession]
) -> None:
    async with cluster(database, holding, 1) as [node], tables_of(database) as tables, of("ada") as session:
        await session.open(node.url)
        assert await tables.value("select count(*) from pgmcp.sessions where address is null") == 1


async def test_in_a_full_cluster_a_handshake_that_was_never_ended_makes_room(database: str, talker: Talker) -> None:
    """Anonymous callers have no name: what is whole stays, whoever it belongs to."""
    async with (
        cluster(database, talker, 2, max_sessions=3) as nodes,
        tables_of(database) as tables,
        RawSession() as whole,
        RawSession() as half,
        RawSession() as young,
        RawSession() as more,
    ):
        await whole.open(nodes[0].url)
        await (await half.initialize(nodes[0].url)).rest()
        await eventually(lambda: carried(tables, 0), "nothing is carried")
        await tables.execute("update pgmcp.sessions set last_active_at = last_active_at - interval '50 seconds'")
        await (await young.initialize(nodes[1].url)).rest()
        assert (await more.initialize(nodes[1].url)).status == 503
        await tables.execute("update pgmcp.sessions set last_active_at = last_active_at - interval '11 seconds'")
        await more.open(nodes[1].url)
        assert await over(half, nodes[1].url)
        await eventually(lambda: nodes[0].incarnation.host.sessions == 1, "its owner has heard of it")
        more.session_id = None
        assert (await more.initialize(nodes[0].url)).status == 503
        for session in (whole, young):
            assert not await over(session, nodes[1].url)
