"""What a node refuses when something is used up: which status, on every node, and that it is free again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from mcp.server.mcpserver import MCPServer

from pgmcp.types import Claimed, Ownership
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

INVALID_REQUEST, INTERNAL_ERROR, PARSE_ERROR = -32600, -32603, -32700
HOLD = {"name": "hold", "arguments": {}}
both = pytest.mark.parametrize("edge", [0, 1])


def refused(exchange: RawExchange, status: int, code: int, *words: str) -> None:
    """Check that an exchange was refused as it should be."""
    assert exchange.status == status, f"{exchange.status} {exchange.body!r}"
    assert exchange.headers["content-type"] == "application/json"
    assert (exchange.headers.get("retry-after") is not None) == (status in {429, 503})
    answer = exchange.json()
    assert (answer["jsonrpc"], answer["id"], answer["error"]["code"]) == ("2.0", None, code)
    for word in words:
        assert word in answer["error"]["message"]


async def reopened(session: RawSession, base: str) -> bool:
    return (await session.initialize(base)).status == 200


async def test_sessions_in_all(database: str, talker: Talker) -> None:
    async with (
        cluster(database, talker, 2, max_sessions=3, max_sessions_per_caller=3) as nodes,
        tables_of(database) as tables,
        contextlib.AsyncExitStack() as stack,
    ):
        # anonymous callers of several addresses: they are not one caller
        callers = [RawSession(headers={"x-forwarded-for": f"10.0.0.{number}"}) for number in range(4)]
        sessions = [await stack.enter_async_context(caller) for caller in callers]
        for session, node in zip(sessions, itertools.cycle(nodes), strict=False):
            if session is not sessions[3]:
                await session.open(node.url)
        before = await tables.counts()
        for node in nodes:
            refused(await sessions[3].initialize(node.url), 503, INTERNAL_ERROR, "3 sessions", "later")
            async with RawSession(path="/sse") as older:
                refused(await older.get(node.url), 503, INTERNAL_ERROR, "3 sessions")
            assert sum(node.incarnation.host.sessions for node in nodes) == 3
        assert await tables.counts() == before
        for node, session in zip(nodes, sessions, strict=False):
            assert (await sessions[2].call(node.url, "ping"))["result"] == {}
            await session.delete(node.url)
            await sessions[3].open(node.url)
            sessions[3].session_id = None  # this one stays, and fills the place again
            refused(await sessions[3].initialize(node.url), 503, INTERNAL_ERROR)


async def test_sessions_of_one_caller(database: str, private: Callable[[], MCPServer]) -> None:
    def of(who: str) -> RawSession:
        return RawSession(headers={"authorization": f"Bearer {who}"})

    async with (
        cluster(database, private, 2, max_sessions_per_caller=2) as nodes,
        of("ada") as one,
        of("ada") as two,
        of("ada") as three,
        of("bob") as other,
    ):
        await one.open(nodes[0].url)
        await two.open(nodes[1].url)
        listening = [await one.get(nodes[1].url), await two.get(nodes[1].url)]  # what is in use makes no room
        for node in nodes:
            refused(await three.initialize(node.url), 429, INVALID_REQUEST, "2 sessions", "end one")
        await other.open(nodes[0].url)
        assert (await one.call(nodes[1].url, "ping"))["result"] == {}
        await one.delete(nodes[1].url)
        await three.open(nodes[0].url)
        listening.append(await three.get(nodes[0].url))
        one.session_id = None
        refused(await one.initialize(nodes[1].url), 429, INVALID_REQUEST)
        for stream in listening:
            await stream.close()


async def test_many_callers_at_once_do_not_pass_the_bound_by_much(database: str, talker: Talker) -> None:
    """Opening counts without a lock: what is under way at the same moment may pass, a pool's worth for each node."""
    async with (
        cluster(database, talker, 2, max_sessions=5, pool_size=3) as nodes,
        tables_of(database) as tables,
        contextlib.AsyncExitStack() as stack,
    ):
        sessions = [await stack.enter_async_context(RawSession()) for _ in range(30)]
        answers = await asyncio.gather(
            *(session.initialize(nodes[place % 2].url) for place, session in enumerate(sessions))
        )
        good = [answer for answer in answers if answer.status == 200]
        assert 5 <= len(good) < 5 + 2 * 3  # at most each connection of both pools saw the last free place
        assert {answer.status for answer in answers} == {200, 503}
        assert await tables.value("select count(*) from pgmcp.sessions") == len(good)


@both
async def test_requests_in_flight(database: str, talker: Talker, edge: int) -> None:
    capabilities: dict[str, Any] = {"elicitation": {"form": {}}}
    async with (
        cluster(database, talker, 2, max_in_flight=3) as nodes,
        tables_of(database) as tables,
        RawSession(capabilities=capabilities) as session,
        RawSession() as stranger,
    ):
        await session.open(nodes[0].url)
        await stranger.open(nodes[1].url)
        held = [
            await session.request(node.url, "tools/call", HOLD, request_id=f"h{place}")
            for place, node in enumerate(nodes)
        ]
        asking = await session.request(nodes[edge].url, "tools/call", {"name": "ask", "arguments": {}}, request_id="a")
        question = await asking.message("elicitation/create")
        await eventually(lambda: talker.running == 2, "both calls run")
        before = await tables.counts()
        for node in nodes:
            refused(await session.request(node.url, "ping"), 429, INVALID_REQUEST, "3 requests", "wait")
            assert (await stranger.call(node.url, "ping"))["result"] == {}
        assert (await tables.counts())["events"] == before["events"] + 2  # the stranger's
        # a repeat of what runs is no further request
        joined = await session.request(nodes[1 - edge].url, "tools/call", HOLD, request_id=f"h{edge}")
        assert joined.status == 200
        # answers and cancels still get through, and make room
        assert (await session.answer(nodes[edge].url, question, {"action": "decline"})).status == 202
        assert (await asking.response("a"))["result"]["content"][0]["text"] == "decline"
        assert (await session.call(nodes[edge].url, "ping"))["result"] == {}
        again = await session.request(nodes[edge].url, "tools/call", HOLD, request_id="h9")
        await eventually(lambda: talker.running == 3, "there is room for another")
        refused(await session.request(nodes[edge].url, "ping"), 429, INVALID_REQUEST)
        cancel = await session.notify(nodes[edge].url, "notifications/cancelled", {"requestId": "h9"})
        assert cancel.status == 202
        assert "error" in await again.response("h9")
        assert (await session.call(nodes[1 - edge].url, "ping"))["result"] == {}
        talker.release.set()
        assert (await joined.response(f"h{edge}"))["result"]["content"][0]["text"] == "held"
        assert "result" in await held[1 - edge].response(f"h{1 - edge}")


@both
async def test_requests_in_flight_that_come_at_once(database: str, talker: Talker, edge: int) -> None:
    """The group that accepts them is one statement, so it must count its own rows too."""
    async with cluster(database, talker, 2, max_in_flight=3) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        exchanges = await asyncio.gather(*(session.request(nodes[edge].url, "tools/call", HOLD) for _ in range(20)))
        statuses = [exchange.status for exchange in exchanges]
        assert set(statuses) == {200, 429}
        # the first of them may be accepted alone, and the rest finds it unfinished
        assert statuses.count(200) == 3, statuses
        talker.release.set()
        for exchange in exchanges:
            if exchange.status == 200:
                await exchange.rest()
        assert (await session.call(nodes[edge].url, "ping"))["result"] == {}


async def test_requests_in_flight_of_a_batch(database: str, talker: Talker) -> None:
    """A batch counts with each of its requests."""
    async with cluster(database, talker, 2, max_in_flight=3) as nodes, RawSession(protocol_version="2025-03-26") as old:
        await old.open(nodes[0].url)
        batch = [{"jsonrpc": "2.0", "id": f"b{n}", "method": "ping"} for n in range(4)]
        for node in nodes:
            refused(await old.post(node.url, batch), 429, INVALID_REQUEST)
            exchange = await old.post(node.url, batch[:3])
            assert exchange.status == 200
            await exchange.rest()


async def test_messages_that_wait_for_a_stalled_owner(database: str, talker: Talker) -> None:
    """Notifications are bounded too: an owner that does not come to claim them fills up."""
    async with (
        cluster(database, talker, 2, max_in_flight=2) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        host, inbox = nodes[0].incarnation.host, nodes[0].incarnation.inbox
        assert (await session.call(nodes[1].url, "ping"))["result"] == {}
        await eventually(lambda: host.movable(busy=True), "the inbox is empty")
        claim, goes_on = inbox.claim, asyncio.Event()

        async def stuck(ownership: Ownership, *, requests: bool = True) -> list[Claimed]:
            await goes_on.wait()
            return await claim(ownership, requests=requests)

        inbox.claim = stuck  # type: ignore[method-assign]
        for number in range(20):
            note = await session.notify(nodes[number % 2].url, "notifications/x")
            assert note.status == 202, note.body
        for node in nodes:
            refused(await session.notify(node.url, "notifications/x"), 429, INVALID_REQUEST)
        assert await tables.value("select count(*) from pgmcp.requests where finished_at is null") == 20
        goes_on.set()
        for node in nodes:
            await eventually(partial(accepted, session, node.url), "there is room again")


async def accepted(session: RawSession, base: str) -> bool:
    return (await session.notify(base, "notifications/x")).status == 202


@both
async def test_open_streams(database: str, talker: Talker, edge: int) -> None:
    async with cluster(database, talker, 2, max_streams=2, keepalive=0.2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        calls = [await session.request(nodes[edge].url, "tools/call", HOLD) for _ in range(2)]
        await eventually(lambda: talker.running == 2, "both run")
        for node in nodes:
            refused(await session.get(node.url), 429, INVALID_REQUEST, "2 streams", "close one")
        await calls[0].close()
        standalone = await eventually(lambda: opened(session, nodes[1 - edge].url), "a stream was let go")
        assert standalone.is_stream
        # the call runs on; its stream wants a place of its own
        event = (await calls[0].rest() and calls[0].last_event_id) or calls[0].last_event_id
        refused(await session.get(nodes[edge].url, event), 429, INVALID_REQUEST)
        await standalone.close()
        resumed = await eventually(lambda: opened(session, nodes[edge].url, event), "the place of the other is free")
        talker.release.set()
        await resumed.rest()
        assert any("result" in message for message in resumed.messages)


async def opened(session: RawSession, base: str, event: str | None = None) -> RawExchange | None:
    exchange = await session.get(base, event)
    return exchange if exchange.status == 200 else None


@both
async def test_a_stream_that_moves_to_another_connection_is_not_one_more(
    database: str, talker: Talker, edge: int
) -> None:
    """A client that lost its connections comes back before the edge has noticed."""
    async with cluster(database, talker, 2, max_streams=2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        call = await session.request(nodes[0].url, "tools/call", HOLD)
        await call.next()
        standalone = await eventually(lambda: opened(session, nodes[0].url), "the standalone stream is open")
        again = await session.get(nodes[edge].url)
        assert again.status == 200, again.body
        await standalone.rest()
        resumed = await session.get(nodes[edge].url, call.last_event_id)
        assert resumed.status == 200, resumed.body
        talker.release.set()
        await resumed.rest()
        assert any("result" in message for message in resumed.messages)


@both
async def test_posts_open_streams_too(database: str, talker: Talker, edge: int) -> None:
    """Calls whose clients do not fetch the answers hold their streams, though nothing is in flight any more."""
    async with cluster(database, talker, 2, max_streams=2, max_in_flight=3) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        calls = [await session.request(nodes[edge].url, "tools/call", HOLD) for _ in range(3)]
        assert [call.status for call in calls] == [200, 200, 429]


@both
async def test_body_batch_and_depth_are_the_settings(database: str, talker: Talker, edge: int) -> None:
    settings: dict[str, Any] = {"max_body": 3000, "max_batch": 3, "max_depth": 5}
    async with cluster(database, talker, 2, **settings) as nodes, RawSession(protocol_version="2025-03-26") as session:
        await session.open(nodes[0].url)
        base = nodes[edge].url

        def padded(length: int) -> bytes:
            start = b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":"'
            return start + b"y" * (length - len(start) - 3) + b'"}}'

        def nested(levels: int) -> bytes:
            inner = b"[" * (levels - 2) + b"]" * (levels - 2)
            return b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":%s}}' % inner

        batch = [{"jsonrpc": "2.0", "id": number, "method": "ping"} for number in range(4)]
        for good in (padded(3000), nested(5), batch[:3]):
            exchange = await session.post(base, good)
            assert exchange.status == 200, exchange.body
            await exchange.rest()
        refused(await session.post(base, padded(3001)), 413, INVALID_REQUEST, "3000 bytes")
        refused(await session.post(base, nested(6)), 400, PARSE_ERROR, "5 levels")
        refused(await session.post(base, batch), 400, INVALID_REQUEST, "1 to 3 messages")
        legacy = RawSession(path=f"/messages/?session_id={session.session_id}")
        refused(await legacy.post(base, padded(3001)), 413, INVALID_REQUEST)
        refused(await legacy.post(base, nested(6)), 400, PARSE_ERROR)
        await legacy.close()
        assert (await session.call(base, "ping"))["result"] == {}
