"""Who has no session, no token or no good will costs his node little, and the others nothing they would notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from urllib.parse import urlsplit

import pytest
from mcp.server.mcpserver import MCPServer

from pgmcp.errors import NodeFull
from pgmcp.types import ANONYMOUS, Accepted, Message
from pgmcp.web import bodies as bodies_module
from pgmcp.web.admission import Caller
from pgmcp.web.bodies import SHARES, SMALL_BYTES, Bodies, Body
from tests.harness.clients import RawSession
from tests.harness.clock import FakeClock
from tests.harness.cluster import RunningNode, cluster
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker
from tests.limits.test_admission import refused
from tests.limits.test_slow_senders import head

BOMB = b'{"jsonrpc":"2.0","id":"bomb","method":"tools/call","params":{"name":"x","arguments":{"x":[%s]}}}' % b",".join(
    [b"[" * 90 + b"]" * 90] * 22_000
)
HELD = 0.25
"""Seconds of CPU for which nothing may hold the loop; of the bombs each was worth a second and more."""


@contextlib.asynccontextmanager
async def sending(
    base: str, path: str, *headers: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A POST of which only the headers are sent."""
    at = urlsplit(base)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    writer.write(head(base, path, *headers))
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@contextlib.asynccontextmanager
async def longest_hold() -> AsyncIterator[list[float]]:
    """How long the loop's thread worked between two turns of the loop, at most: its CPU time, not the machine's."""
    found = [0.0]

    async def look() -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            found[0], before = max(found[0], now - before), now

    task = asyncio.create_task(look())
    try:
        yield found
    finally:
        task.cancel()


async def test_no_body_holds_the_loop(database: str, talker: Talker) -> None:
    async with (
        cluster(database, talker, 1, response="json") as [node],
        RawSession() as session,
        RawSession(path="/sse") as older,
        RawSession() as stranger,
        RawSession(headers={"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call"}) as modern,
    ):
        await session.open(node.url)
        older.path = str((await (await older.get(node.url)).event()).data)
        stranger.session_id = "made-up"
        async with longest_hold() as held:
            answers = await asyncio.gather(*(each.post(node.url, BOMB) for each in (session, older, stranger, modern)))
            bare = await stranger.post(node.url, BOMB, headers={"mcp-session-id": ""})
        for answer in (answers[0], answers[1], answers[3], bare):
            refused(answer, 400, -32700, "50000 brackets", "one string")
        refused(answers[2], 404, -32600)
        assert held[0] < HELD
        text = BOMB.decode() + '\\"{[,:' * 10_000
        talker.release.set()
        assert not (await session.call_tool(node.url, "hold", x=text[:4_000_000])).get("isError")


@pytest.mark.parametrize("session_id", ["made-up", "own"])
async def test_whose_large_bodies_are_refused_waits_before_the_next_is_read(
    database: str, talker: Talker, monkeypatch: pytest.MonkeyPatch, session_id: str
) -> None:
    monkeypatch.setattr(bodies_module, "REFUSED_SECONDS", 2.0)
    async with cluster(database, talker, 1, response="json") as [node], RawSession() as session:
        await session.open(node.url)
        session.session_id = session.session_id if session_id == "own" else session_id
        loop, read = asyncio.get_running_loop(), len(BOMB) * SHARES // 4
        began = loop.time()
        first = [asyncio.create_task(session.post(node.url, BOMB)) for _ in range(SHARES // 4)]
        await eventually(lambda: node.bodies.total >= read, "all that may be read was read")
        more = await session.post(node.url, BOMB)
        assert (more.status, b"bodies" in more.body) == (503, True)
        assert node.bodies.total <= read
        assert {answer.status for answer in await asyncio.gather(*first)} == {400 if session_id == "own" else 404}
        assert loop.time() - began >= 2
        assert node.bodies.total == 0
        small = await session.post(node.url, b"{")  # what costs nothing is refused at once
        assert small.status == 400
        assert loop.time() - began < 30


async def test_a_strangers_host_is_told_so_before_its_body(database: str, talker: Talker) -> None:
    async with cluster(database, talker, 1) as [node]:
        for header in ("host: evil.example", "origin: https://evil.example"):
            for path in ("/mcp", "/messages/?session_id=x"):
                async with sending(node.url, path, header, "content-length: 4000000") as (reader, _):
                    head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 10)
            assert head.split()[1] in {b"421", b"403", b"400"}
        async with sending(node.url, "/sse", "content-length: 4000000") as (reader, _):
            assert b" 405 " in await asyncio.wait_for(reader.readuntil(b"\r\n"), 10)
        assert node.bodies.total == 0


# -- bodies in memory --------------------------------------------------------------------------------------------------


def whose(name: str) -> Caller:
    return Caller(ANONYMOUS, name)


def test_bodies_in_memory_are_bounded_for_all_and_for_each_caller() -> None:
    bodies, large = Bodies(100_000, FakeClock()), 100_000
    with contextlib.ExitStack() as stack:
        for name in "abcd":
            for _ in range(SHARES // 4):
                stack.enter_context(bodies.body(whose(name))).grow(large)
            for more in (stack.enter_context(bodies.body(whose(name))) for _ in range(2)):
                with pytest.raises(NodeFull, match="your bodies"):
                    more.grow(SMALL_BYTES + 1)
        assert bodies.total == SHARES * large
        for attempt in (Body.expect, Body.grow):
            with bodies.body(whose("e")) as body, pytest.raises(NodeFull, match="another one"):
                attempt(body, SMALL_BYTES + 1)
        for name in "abcde":  # calls get through all the same
            stack.enter_context(bodies.body(whose(name))).grow(SMALL_BYTES)
        with bodies.body(whose("e")) as body:
            body.grow(SMALL_BYTES)
            with pytest.raises(NodeFull):
                body.grow(SMALL_BYTES)  # not small any more
    assert bodies.total == 0
    assert bodies.callers == 0


async def test_a_caller_whose_bodies_are_too_many_is_told_so_before_the_next_is_read(
    database: str, talker: Talker
) -> None:
    size, part = 40_000, b" " * 39_000
    async with (
        cluster(database, talker, 1, max_body=size) as [node],
        RawSession() as session,
        contextlib.AsyncExitStack() as stack,
    ):
        await session.open(node.url)
        for _ in range(SHARES // 4):
            _, writer = await stack.enter_async_context(sending(node.url, "/mcp", f"content-length: {size}"))
            writer.write(part)
        await eventually(lambda: node.bodies.total == SHARES // 4 * len(part), "the bodies trickle")
        async with sending(node.url, "/mcp", f"content-length: {size}") as (reader, _):
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert b" 503 " in answer
        assert b"retry-after: 1" in answer
        async with sending(node.url, "/mcp", "transfer-encoding: chunked") as (reader, writer):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            assert b" 503 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert (await session.call(node.url, "ping"))["result"] == {}
        await stack.aclose()
        await eventually(lambda: node.bodies.total == 0, "whoever hung up counts no longer")


async def test_what_was_stored_is_not_held_while_it_is_answered(database: str, talker: Talker) -> None:
    async with cluster(database, talker, 1) as [node], RawSession() as session:
        await session.open(node.url)
        params = {"name": "hold", "arguments": {}, "_meta": {"x": "y" * 1_000_000}}
        call = await session.request(node.url, "tools/call", params)
        await eventually(lambda: talker.running == 1, "the call runs")
        assert node.bodies.total == 0
        talker.release.set()
        await call.rest()


# -- counts and lines before the check of whose a session is -----------------------------------------------------------


@contextlib.contextmanager
def held_up(node: RunningNode, subject: str) -> Iterator[list[str]]:
    """Accepting what one principal sends waits until the context ends."""
    inbox, opened, inside = node.incarnation.inbox, asyncio.Event(), []
    accept, node.incarnation.edge.admission.young = inbox.accept, 0.001

    async def accept_later(messages: Sequence[Message]) -> Accepted:
        if messages[0].principal.subject == subject:
            inside.append(messages[0].session_id)
            await opened.wait()
        return await accept(messages)

    inbox.accept = accept_later  # type: ignore[method-assign]  # until the context ends
    try:
        yield inside
    finally:
        opened.set()
        inbox.accept = accept  # type: ignore[method-assign]


async def test_a_strangers_requests_take_no_room_of_a_session_and_tell_him_nothing(
    database: str, private: Callable[[], MCPServer]
) -> None:
    def of(who: str) -> RawSession:
        return RawSession(headers={"authorization": f"Bearer {who}"})

    async with (
        cluster(database, private, 1, max_streams=3) as [node],
        of("ada") as ada,
        of("bob") as known,
        of("bob") as made_up,
    ):
        await ada.open(node.url)
        assert ada.session_id is not None
        known.session_id, made_up.session_id = ada.session_id, f"{ada.session_id[:-1]}~"
        with held_up(node, "bob") as inside:
            posts = {
                who: [asyncio.create_task(who.request(node.url, "ping")) for _ in range(5)] for who in (known, made_up)
            }
            await eventually(lambda: len(inside) == 6, "three of each are in acceptance")
            assert (await ada.call(node.url, "ping"))["result"] == {}
        statuses = [sorted([(await post).status for post in each]) for each in posts.values()]
        assert statuses == [[404, 404, 404, 429, 429]] * 2
        # and what the owner has open is no sign for the stranger
        with held_up(node, "ada") as inside:
            own = [asyncio.create_task(ada.request(node.url, "ping")) for _ in range(3)]
            await eventually(lambda: len(inside) == 3, "the owner's room is full")
            for who in (known, made_up):
                refused(await who.request(node.url, "ping"), 404, -32600)
        assert [(await each).status for each in own] == [200] * 3


async def test_a_strangers_large_body_is_not_looked_into(
    database: str, private: Callable[[], MCPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    check = "pgmcp.web.json_limits.JsonLimits.check_large"

    async def seen(_: object, body: bytes) -> None:
        looked.append(len(body))

    monkeypatch.setattr(check, seen)
    body = json.dumps({"jsonrpc": "2.0", "method": "notifications/x", "params": {"x": "y" * 50_000}}).encode()
    async with cluster(database, private, 1) as [node], RawSession() as bare, RawSession() as ada, RawSession() as bob:
        ada.http.headers["authorization"], bob.http.headers["authorization"] = "Bearer ada", "Bearer bob"
        await ada.open(node.url)
        bob.session_id = bare.session_id = ada.session_id
        assert (await bare.post(node.url, body)).status == 401
        refused(await bob.post(node.url, body), 404, -32600)
        assert not looked
        assert (await ada.post(node.url, body)).status == 202
        assert looked == [len(body)]
