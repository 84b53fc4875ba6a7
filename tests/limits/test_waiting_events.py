"""What waits on the standalone stream while nobody listens: bounded, coalesced by method and uri, in order."""

from __future__ import annotations

import asyncio

import pytest

from pgmcp.types import CARRIED, Cursor, Page
from tests.harness.clients import Message, RawExchange, RawSession
from tests.harness.cluster import Tables, cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

both = pytest.mark.parametrize("edge", [0, 1])
WAITING = """select count(*) from pgmcp.events e join pgmcp.streams s on s.id = e.stream where s.kind = 'standalone'"""
QUIET = 0.3


async def all_of(exchange: RawExchange) -> list[Message]:
    """What comes until it is silent for a while."""
    while True:
        try:
            await exchange.next(QUIET)
        except TimeoutError:
            return exchange.messages


def said(messages: list[Message], method: str, key: str) -> list[object]:
    return [message["params"][key] for message in messages if message["method"] == method]


@both
async def test_what_waits_is_coalesced(database: str, talker: Talker, edge: int) -> None:
    async with cluster(database, talker, 2) as nodes, tables_of(database) as tables, RawSession() as session:
        await session.open(nodes[0].url)
        here, there = nodes[edge].url, nodes[1 - edge].url
        await session.call_tool(here, "update", uris=["a://1", "a://2", "a://1", "a://3", "a://1"])
        await session.call_tool(there, "change", count=5)
        await session.call_tool(here, "update", uris=["a://2"])
        await session.call_tool(there, "note", first=0, count=3)
        await session.call_tool(here, "change", count=1)
        assert await tables.value(WAITING) == 3 + 2 + 3
        messages = await all_of(await session.get(there))
        assert [message["method"].removeprefix("notifications/") for message in messages] == [
            *["resources/updated"] * 3, *["message"] * 3, "tools/list_changed", "prompts/list_changed"
        ]  # fmt: skip
        assert said(messages, "notifications/resources/updated", "uri") == ["a://3", "a://1", "a://2"]
        assert said(messages, "notifications/message", "data") == ["0", "1", "2"]


@both
async def test_what_was_delivered_is_not_taken_back(database: str, talker: Talker, edge: int) -> None:
    """A listener gets each update; one that comes later gets only what is newer."""
    async with cluster(database, talker, 2) as nodes, tables_of(database) as tables, RawSession() as session:
        await session.open(nodes[0].url)
        listening = await session.get(nodes[edge].url)
        for number in range(3):
            await session.call_tool(nodes[edge].url, "update", uris=["a://1"])
            await listening.message("notifications/resources/updated")
            assert len(listening.messages) == number + 1
        first = listening.seen[0].id
        await listening.close()
        sinks = "select count(*) from pgmcp.streams where sink is not null"
        await eventually(lambda: is_(tables, sinks, 0), "it has gone")
        await session.call_tool(nodes[1 - edge].url, "update", uris=["a://1", "a://1"])
        resumed = await all_of(await session.get(nodes[1 - edge].url, first))
        assert len(resumed) == 4  # the three that were delivered, and the newest
        assert len(await all_of(await session.get(nodes[edge].url))) == 0


async def is_(tables: Tables, query: str, expected: int) -> bool:
    return bool(await tables.value(query) == expected)


@both
async def test_only_so_many_wait_and_the_newest_stay(database: str, talker: Talker, edge: int) -> None:
    most = 20
    async with (
        cluster(database, talker, 2, max_waiting_events=most) as nodes,
        tables_of(database) as tables,
        RawSession(capabilities={"roots": {}}) as session,
    ):
        await session.open(nodes[0].url)
        base = nodes[edge].url
        asking = [
            await session.request(base, "tools/call", {"name": "roots", "arguments": {}}, request_id=f"r{n}")
            for n in range(2)
        ]
        await eventually(lambda: is_(tables, WAITING, 2), "two questions wait")
        await session.call_tool(base, "update", uris=["a://first"])
        await session.call_tool(base, "note", first=0, count=200)
        assert await tables.value(WAITING) <= most + 2
        await session.call_tool(base, "update", uris=[f"a://{number}" for number in range(50)])
        await session.call_tool(base, "note", first=200, count=5)
        assert await tables.value(WAITING) <= most + 2
        listening = await session.get(nodes[1 - edge].url)
        messages = await all_of(listening)
        # questions never give way, and stay first
        assert [message["method"] for message in messages[:2]] == ["roots/list"] * 2
        assert said(messages, "notifications/message", "data") == [str(number) for number in range(200, 205)]
        assert said(messages, "notifications/resources/updated", "uri") == [f"a://{n}" for n in range(35, 50)]
        for question in messages[:2]:
            await session.answer(base, question, {"roots": [{"uri": "file:///x"}]})
        for n, exchange in enumerate(asking):
            assert (await exchange.response(f"r{n}"))["result"]["content"][0]["text"] == "1"


@both
async def test_a_listener_that_reads_gets_all_of_a_burst(database: str, talker: Talker, edge: int) -> None:
    """What waits is what it has not got yet, however much that is for a moment."""
    uris = [f"a://{number}" for number in range(1000)]
    async with cluster(database, talker, 2) as nodes, tables_of(database) as tables, RawSession() as session:
        await session.open(nodes[0].url)
        listening = await session.get(nodes[1].url)
        call = asyncio.create_task(session.call_tool(nodes[edge].url, "burst", 30, uris=uris))
        got = [(await listening.message("notifications/resources/updated", 30))["params"]["uri"] for _ in uris]
        await call
        assert got == uris
        assert await tables.value("select floor_seq from pgmcp.streams where kind = 'standalone'") == 0


@both
async def test_a_client_is_told_that_some_had_to_give_way(database: str, talker: Talker, edge: int) -> None:
    """With the id of an event: 204. Without one it asks for what waits, and gets that, also after another cut."""
    most = 20
    async with cluster(database, talker, 2, max_waiting_events=most) as nodes, RawSession() as session:
        gone = lambda: sum(len(node.incarnation.open_streams) for node in nodes) == 0  # noqa: E731
        await session.open(nodes[0].url)
        base, other = nodes[edge].url, nodes[1 - edge].url
        listening = await session.get(base)
        await session.call_tool(base, "note", first=0, count=2)
        for _ in range(2):
            await listening.message("notifications/message")
        first, last = listening.seen[0].id, listening.last_event_id
        await listening.close()
        await eventually(gone, "it has gone")
        # what gives way to a newer one of its kind leaves no gap
        await session.call_tool(base, "update", uris=["a://1"] * (2 * most))
        resumed = await session.get(other, first)
        assert said(await all_of(resumed), "notifications/message", "data") == ["0", "1"]
        assert len(said(resumed.messages, "notifications/resources/updated", "uri")) == 1
        await resumed.close()
        await eventually(gone, "it has gone")
        for turn in range(2):
            await session.call_tool(base, "note", first=100 * turn, count=50)
            for cursor in (first, last):
                assert (await session.get(other, cursor)).status == 204
                await eventually(gone, "it has let go")  # else the next one takes the stream from it
            fresh = await session.get(other)
            wanted = [str(number) for number in range(100 * turn + 50 - most, 100 * turn + 50)]
            assert said(await all_of(fresh), "notifications/message", "data") == wanted
            await fresh.close()
            await eventually(gone, "it has gone")
            onward = await session.get(base, fresh.last_event_id)
            assert onward.status == 200
            await onward.close()
            await eventually(gone, "it has gone")


@both
async def test_a_listener_that_falls_behind_too_far_notices(database: str, talker: Talker, edge: int) -> None:
    """While it is attached much more may wait; beyond that its stream ends, and it is told when it comes back."""
    async with cluster(database, talker, 2, max_waiting_events=1) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        listening = await session.get(nodes[edge].url)
        primed = (await listening.event()).id
        log = nodes[edge].incarnation.log
        read, turn = log.read, asyncio.Event()

        async def slow(cursor: Cursor) -> Page:
            await turn.wait()
            return await read(cursor)

        log.read = slow  # type: ignore[method-assign]  # it takes its time
        await session.call_tool(nodes[1 - edge].url, "note", first=0, count=CARRIED)
        turn.set()
        got = [(await listening.message("notifications/message"))["params"]["data"] for _ in range(CARRIED)]
        assert got == [str(number) for number in range(CARRIED)]
        behind, taken = listening.last_event_id, len(listening.messages)
        turn.clear()
        # one read may be on its way; what it takes is not lost
        await session.call_tool(nodes[1 - edge].url, "note", first=100, count=3 * CARRIED)
        turn.set()
        await listening.rest()
        assert listening.error is None
        missed = said(listening.messages[taken:], "notifications/message", "data")
        assert missed == [str(number) for number in range(100, 100 + len(missed))]
        assert len(missed) < CARRIED
        for cursor in (primed, behind):
            await eventually(lambda: not any(len(node.incarnation.open_streams) for node in nodes), "it has gone")
            assert (await session.get(nodes[1 - edge].url, cursor)).status == 204
        await eventually(lambda: not any(len(node.incarnation.open_streams) for node in nodes), "it has gone")
        fresh = said(await all_of(await session.get(nodes[1 - edge].url)), "notifications/message", "data")
        assert fresh[-1] == str(100 + 3 * CARRIED - 1)
        assert len(fresh) <= CARRIED + 1


async def test_a_question_that_was_taken_back_takes_no_place_of_another(database: str, talker: Talker) -> None:
    """Cancelled questions stay questions: both messages wait, in order."""
    async with cluster(database, talker, 2) as nodes, RawSession(capabilities={"roots": {}}) as session:
        await session.open(nodes[0].url)
        asking = await session.request(nodes[1].url, "tools/call", {"name": "roots", "arguments": {}}, request_id="r")
        await asking.next()
        await session.notify(nodes[1].url, "notifications/cancelled", {"requestId": "r"})
        await asking.rest()
        messages = await all_of(await session.get(nodes[0].url))
        assert [message["method"] for message in messages] in (
            ["roots/list", "notifications/cancelled"],
            ["notifications/cancelled"],
            ["roots/list"],
            [],
        )
        if len(messages) == 2:
            assert messages[1]["params"]["requestId"] == messages[0]["id"]


async def test_tools_that_talk_at_once_stay_within_the_bound(database: str, talker: Talker) -> None:
    most = 20
    async with (
        cluster(database, talker, 2, max_waiting_events=most) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        await asyncio.gather(
            *(session.call_tool(nodes[n % 2].url, "note", first=100 * n, count=10) for n in range(20)),
            *(session.call_tool(nodes[n % 2].url, "update", uris=["a://1"] * 5) for n in range(10)),
        )
        await session.call_tool(nodes[0].url, "note", first=0, count=1)
        assert await tables.value(WAITING) <= most + 1
        await session.call_tool(nodes[0].url, "update", uris=["a://1"])
        updates = f"{WAITING} and convert_from(message, 'UTF8') like '%resources/updated%'"
        assert await tables.value(updates) == 1


async def test_answers_that_no_http_sse_client_fetches_are_bounded(database: str, talker: Talker) -> None:
    """Its answers wait on its only stream; a client that posts and never reads is told to stop."""
    async with cluster(database, talker, 2, max_in_flight=2) as nodes, tables_of(database) as tables:
        async with RawSession(path="/sse") as client:
            stream = await client.get(nodes[0].url)
            where = str((await stream.event()).data)
            await stream.close()
        await eventually(lambda: is_(tables, "select count(*) from pgmcp.streams where sink is not null", 0), "gone")
        async with RawSession(path=where) as poster:
            initialize = {
                "protocolVersion": "2024-11-05",
                "capabilities": {},
                "clientInfo": {"name": "", "version": ""},
            }
            ids, statuses = iter(range(1000)), []
            first = {"jsonrpc": "2.0", "id": "i", "method": "initialize", "params": initialize}
            assert (await poster.post(nodes[0].url, first)).status == 202
            unfinished = "select count(*) from pgmcp.requests where finished_at is null"
            for _ in range(60):
                statuses.append((await poster.request(nodes[1].url, "ping", request_id=next(ids))).status)
                await eventually(lambda: is_(tables, unfinished, 0), "answered")
                if statuses[-1] != 202:
                    break
            assert statuses[-1] == 429
            assert await tables.value(WAITING) <= 20 + 1
