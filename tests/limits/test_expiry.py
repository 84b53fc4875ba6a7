"""Idle time, age and retention: what is over goes, what lives stays, and clients are told the right thing."""

from __future__ import annotations

import pytest

from pgmcp.store.retention import Retention
from pgmcp.types import Cursor, Page
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

both = pytest.mark.parametrize("edge", [0, 1])
HOLD = {"name": "hold", "arguments": {}}
OF_SESSIONS = ("sessions", "journal", "requests", "streams", "events")
SINKS = "select count(*) from pgmcp.streams where sink is not null"
HOUR = 3600.0
LATER = 62.0
"""Seconds by which use may be later than it is noted, and a bit."""


def retention(node: RunningNode) -> Retention:
    return node.retention


async def age(tables: Tables, seconds: float, *columns: str) -> None:
    """Let time pass, in the database alone."""
    for column in columns:
        table, name = column.split(".")
        await tables.execute(f"update pgmcp.{table} set {name} = {name} - make_interval(secs => $1)", seconds)


async def is_(tables: Tables, query: str, expected: int) -> bool:
    return bool(await tables.value(query) == expected)


async def gone(session: RawSession, base: str) -> None:
    """Check that a node knows that the session is over."""
    for exchange in (
        await session.request(base, "ping"),
        await session.notify(base, "notifications/x"),
        await session.get(base),
        await session.delete(base),
    ):
        assert exchange.status == 404
        assert exchange.json()["error"] == {"code": -32600, "message": "Session not found"}


@both
async def test_an_idle_session_ends_and_a_used_one_does_not(database: str, talker: Talker, edge: int) -> None:
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as idle,
        RawSession() as listening,
        RawSession() as working,
        RawSession() as used,
    ):
        for session in (idle, listening, working, used):
            await session.open(nodes[0].url)
            await session.call(nodes[1].url, "ping")
        stream = await listening.get(nodes[edge].url)
        call = await working.request(nodes[edge].url, "tools/call", HOLD)
        await eventually(lambda: talker.running == 1, "the call runs")
        await call.close()  # its work goes on
        await eventually(lambda: is_(tables, SINKS, 1), "the streams are released")
        assert await retention(nodes[edge]).expire() == []
        await age(tables, HOUR - 10, "sessions.last_active_at")
        assert await retention(nodes[edge]).expire() == []
        await used.call(nodes[edge].url, "ping")
        await age(tables, 10 + LATER, "sessions.last_active_at")
        await eventually(lambda: is_(tables, SINKS, 1), "the streams are released")
        await nodes[edge].sweep()
        assert await tables.value("select count(*) from pgmcp.sessions") == 3
        for node in nodes:
            await gone(idle, node.url)
            assert (await used.call(node.url, "ping"))["result"] == {}
            assert (await listening.call(node.url, "ping"))["result"] == {}
        await eventually(lambda: nodes[0].incarnation.host.sessions == 3, "its actor has stopped")
        assert talker.running == 1
        await stream.close()
        talker.release.set()


@both
async def test_every_session_ends_with_its_age(database: str, talker: Talker, edge: int) -> None:
    async with (
        cluster(database, talker, 2, max_age=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
        RawSession() as young,
    ):
        await session.open(nodes[0].url)
        call = await session.request(nodes[edge].url, "tools/call", HOLD)
        standalone = await session.get(nodes[1 - edge].url)
        await eventually(lambda: talker.running == 1, "the call runs")
        await age(tables, HOUR + 1, "sessions.created_at")
        await young.open(nodes[edge].url)
        await nodes[edge].sweep()
        for stream in (call, standalone):  # both nodes end their exchanges, with the final chunk
            await stream.rest(timeout=5)
            assert stream.error is None
            assert not any("result" in message for message in stream.messages)
        for node in nodes:
            await gone(session, node.url)
        await eventually(lambda: talker.running == 0, "the tool was stopped")
        await eventually(lambda: sum(len(node.incarnation.open_streams) for node in nodes) == 0, "no open streams")
        assert nodes[0].incarnation.host.sessions + nodes[1].incarnation.host.sessions == 1
        assert (await young.call(nodes[edge].url, "ping"))["result"] == {}
        await young.delete(nodes[edge].url)
        assert {name: rows for name, rows in (await tables.counts()).items() if name in OF_SESSIONS and rows} == {}


@both
async def test_an_http_sse_session_waits_a_minute_for_its_client(database: str, talker: Talker, edge: int) -> None:
    async with cluster(database, talker, 2) as nodes, tables_of(database) as tables, RawSession(path="/sse") as client:
        stream = await client.get(nodes[0].url)
        assert (await stream.event()).event == "endpoint"
        await age(tables, 180, "sessions.last_active_at")
        assert await retention(nodes[edge]).expire() == []  # its stream is carried
        await stream.close()
        await eventually(lambda: is_(tables, SINKS, 0), "the stream is released")
        await age(tables, 59, "sessions.last_active_at")
        assert await retention(nodes[edge]).expire() == []  # it was used until now
        await age(tables, LATER, "sessions.last_active_at")
        await nodes[edge].sweep()
        assert await tables.value("select count(*) from pgmcp.sessions") == 0
        await eventually(lambda: nodes[0].incarnation.host.sessions == 0, "its actor has stopped")


@both
async def test_what_is_finished_goes_and_what_lives_stays(database: str, talker: Talker, edge: int) -> None:
    async with cluster(database, talker, 2, retention=60) as nodes, tables_of(database) as tables, RawSession() as live:
        await live.open(nodes[0].url)
        base, other = nodes[edge].url, nodes[1 - edge].url
        finished = await live.request(base, "tools/call", {"name": "flood", "arguments": {"count": 3, "size": 1}})
        await finished.rest()
        broken = await live.request(base, "tools/call", HOLD, request_id="broken")
        cursor = (await broken.event()).id
        await broken.close()
        running = await live.request(other, "tools/call", HOLD, request_id="running")
        await running.next()
        await eventually(lambda: talker.running == 2, "both run")
        await live.call_tool(base, "note", first=0, count=2)
        everything = ("streams.closed_at", "streams.released_at", "streams.marked_at", "requests.finished_at")
        await age(tables, 30, *everything)
        before = await tables.counts()
        await retention(nodes[edge]).prune()
        assert await tables.counts() == before  # too young
        await age(tables, 31, *everything)
        await retention(nodes[edge]).prune()
        # what runs, and what nobody has fetched from the standalone stream
        assert await tables.value("select count(*) from pgmcp.streams") == 3
        assert await tables.value("select count(*) from pgmcp.requests") == 2
        assert await tables.value("select count(*) from pgmcp.events") == 2
        for node in nodes:
            pruned = await live.get(node.url, finished.seen[1].id)
            assert (pruned.status, pruned.body) == (204, b"")
            assert "content-type" not in pruned.headers
        talker.release.set()
        assert (await running.response("running"))["result"]["content"][0]["text"] == "held"
        resumed = await live.get(other, cursor)
        assert (await resumed.response("broken"))["result"]["content"][0]["text"] == "held"
        await resumed.rest()
        listening = await live.get(base)
        for number in "01":
            assert (await listening.message("notifications/message"))["params"]["data"] == number
        last, first = listening.last_event_id, listening.seen[0].id
        await listening.close()
        await eventually(lambda: is_(tables, SINKS, 0), "the streams are released")
        for _ in range(2):  # what was delivered gets a mark, and goes when that is old
            await retention(nodes[1 - edge]).prune()
            await age(tables, 61, *everything)
        await retention(nodes[1 - edge]).prune()
        assert await tables.value("select count(*) from pgmcp.streams") == 1
        assert await tables.value("select count(*) from pgmcp.requests") == 0
        assert await tables.value("select count(*) from pgmcp.events") == 0
        assert (await live.get(other, first)).status == 204  # what came after it is not there any more
        assert (await live.get(other, cursor)).status == 204
        onward = await live.get(other, last)
        assert onward.status == 200
        await live.call_tool(base, "note", first=7, count=1)
        assert (await onward.message("notifications/message"))["params"]["data"] == "7"


class EventSource:
    """An HTTP+SSE client that comes back with what it has, as a browser's does."""

    def __init__(self, client: RawSession) -> None:
        self._client = client
        self.stream: RawExchange
        self.where = ""

    async def get(self, base: str, last: str | None = None) -> None:
        self.stream = await self._client.get(base, last)
        self.where = str((await self.stream.event()).data)
        self.stream.seen.clear()

    async def post(self, base: str, method: str, rpc_id: str | None = None, /, **params: object) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params} | ({} if rpc_id is None else {"id": rpc_id})
        async with RawSession(path=self.where) as poster:
            assert (await poster.post(base, message)).status == 202

    async def open(self, base: str) -> None:
        await self.get(base)
        info = {"name": "raw", "version": "1"}
        await self.post(base, "initialize", "i", protocolVersion="2024-11-05", capabilities={}, clientInfo=info)
        await self.stream.response("i")
        await self.post(base, "notifications/initialized")

    async def call(self, base: str, name: str, **arguments: object) -> None:
        await self.post(base, "tools/call", "c", name=name, arguments=arguments)
        await self.stream.response("c")


@both
async def test_an_http_sse_client_whose_events_were_pruned_starts_anew(
    database: str, talker: Talker, edge: int
) -> None:
    """Never a silent gap: it gets another session, and the old one expires."""
    async with (
        cluster(database, talker, 2, retention=60) as nodes,
        tables_of(database) as tables,
        RawSession(path="/sse") as client,
    ):
        base, other = nodes[edge].url, nodes[1 - edge].url
        source = EventSource(client)
        await source.open(nodes[0].url)
        old, early = source.where, source.stream.last_event_id
        await source.call(other, "update", uris=["a://1"])
        last = source.stream.last_event_id
        await source.stream.close()
        await eventually(lambda: is_(tables, SINKS, 0), "the stream is released")
        # what gives way to a newer one before it was delivered leaves no gap
        await source.post(base, "tools/call", "c", name="update", arguments={"uris": ["a://1", "a://2", "a://1"]})
        await eventually(lambda: is_(tables, "select count(*) from pgmcp.events where seq > 3", 3), "answered")
        await retention(nodes[1 - edge]).prune()
        await age(tables, 61, "streams.marked_at")
        await retention(nodes[1 - edge]).prune()
        assert await tables.value("select floor_seq from pgmcp.streams") == 3
        await source.get(base, last)
        assert source.where == old
        await source.stream.response("c")
        assert [message["params"]["uri"] for message in source.stream.messages[:-1]] == ["a://2", "a://1"]
        await source.get(other, early)
        assert source.where != old
        await eventually(lambda: is_(tables, SINKS, 1), "the old stream is carried by nobody")
        with pytest.raises(TimeoutError):
            await source.stream.next(0.3)
        await age(tables, 60 + LATER, "sessions.last_active_at")
        assert len(await retention(nodes[edge]).expire()) == 1
        async with RawSession(path=old) as poster:
            assert (await poster.request(base, "ping")).status == 404


@both
async def test_what_is_pruned_before_it_is_read_is_no_gap_either(database: str, talker: Talker, edge: int) -> None:
    """A sweep falls between the attach and the read: the stream ends, and the client is told the truth next time."""
    async with (
        cluster(database, talker, 2, retention=60) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        base = nodes[edge].url
        listening = await session.get(base)
        await session.call_tool(base, "note", first=0, count=3)
        for _ in range(3):
            await listening.message("notifications/message")
        first = listening.seen[1].id
        await listening.close()
        await eventually(lambda: is_(tables, SINKS, 0), "the stream is released")
        await retention(nodes[1 - edge]).prune()
        await age(tables, 61, "streams.marked_at")
        log = nodes[edge].incarnation.log
        read = log.read

        async def late(cursor: Cursor) -> Page:
            await retention(nodes[1 - edge]).prune()
            return await read(cursor)

        log.read = late  # type: ignore[method-assign]  # it takes its time
        resumed = await session.get(base, first)
        await resumed.rest()
        assert resumed.messages == []
        assert (await session.get(base, first)).status == 204


@both
async def test_a_stream_that_is_being_carried_is_not_pruned(database: str, talker: Talker, edge: int) -> None:
    """A client that reads slowly still gets the end of a stream that was finished long ago."""
    count, size = 200, 100_000
    async with (
        cluster(database, talker, 2, retention=60) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        flood = {"name": "flood", "arguments": {"count": count, "size": size}}
        body = {"jsonrpc": "2.0", "id": "big", "method": "tools/call", "params": flood}
        headers = {"mcp-session-id": str(session.session_id), "accept": "application/json, text/event-stream",
                   "content-type": "application/json"}  # fmt: skip
        async with session.http.stream("POST", f"{nodes[edge].url}/mcp", json=body, headers=headers) as response:
            pieces = response.aiter_raw()
            await anext(pieces)
            closed = "select count(*) from pgmcp.streams where closed and sink is not null"
            unfinished = "select count(*) from pgmcp.requests where finished_at is null"
            await eventually(lambda: is_(tables, unfinished, 0), "the call has ended")
            assert await tables.value(closed) >= 1
            await age(tables, 61, "streams.closed_at", "requests.finished_at", "events.stored_at")
            await retention(nodes[1 - edge]).prune()
            rest = b"".join([piece async for piece in pieces])
        assert rest.endswith(b"\r\n\r\n")
        assert b"flooded" in rest[-1000:]


@both
async def test_a_big_heap_goes_in_small_batches(database: str, talker: Talker, edge: int) -> None:
    async with cluster(database, talker, 2, retention=60) as nodes, tables_of(database) as tables, RawSession() as live:
        await live.open(nodes[0].url)
        await eventually(lambda: is_(tables, SINKS, 0), "the stream is released")
        await tables.execute(
            "insert into pgmcp.streams (id, session, kind, closed, closed_at) "
            "select gen_random_uuid(), (select id from pgmcp.sessions), 'request', true, now() - interval '1 hour' "
            "from generate_series(1, 2000)"
        )
        await tables.execute(
            "insert into pgmcp.requests (id, session, body, context, open, finished_at, claimed_epoch) "
            "select gen_random_uuid(), (select id from pgmcp.sessions), '', '', false, now() - interval '1 hour', 1 "
            "from generate_series(1, 2000)"
        )
        await retention(nodes[edge]).prune()
        assert (
            await tables.value("select count(*) from pgmcp.streams where closed_at < now() - interval '1 minute'") == 0
        )
        assert (
            await tables.value("select count(*) from pgmcp.requests where finished_at < now() - interval '1 minute'")
            == 0
        )
        assert (await live.call(nodes[edge].url, "ping"))["result"] == {}
