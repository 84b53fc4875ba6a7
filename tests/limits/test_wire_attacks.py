"""Attacks on what lies before and around bodies: pipelines, tiny chunks and headers, upgrades, bodies that stay."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pgmcp.node.http_protocol import HEAD_BYTES
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster
from tests.limits.conftest import Talker
from tests.limits.test_headers import connected, to_the_end
from tests.limits.test_strangers import longest_hold

HELD = 0.05
"""Seconds of CPU for which no body is to hold the event loop, on a machine with nothing else to do."""


def cycles() -> int:
    return sum(isinstance(each, RequestResponseCycle) for each in gc.get_objects())


async def test_requests_that_wait_in_a_connection_are_bounded(database: str, talker: Talker) -> None:
    """Behind a stream that never ends: each of them is a task's worth of objects, and nobody counts them."""
    async with (
        cluster(database, talker, 1) as [node],
        RawSession() as session,
        connected(node) as (reader, writer),
    ):
        await session.open(node.url)
        lines = f"host: 127.0.0.1:1\r\nmcp-session-id: {session.session_id}\r\naccept: text/event-stream\r\n\r\n"
        writer.write(b"GET /mcp HTTP/1.1\r\n" + lines.encode())
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        before = cycles()
        async with longest_hold() as held:
            writer.write(b"GET / HTTP/1.1\r\n\r\n" * 14_000)
            await to_the_end(reader)
        assert cycles() - before < 100
        assert held[0] < 5 * HELD


async def test_requests_that_are_answered_in_turn_do_not_pile_up(database: str, talker: Talker) -> None:
    """Each answer lets the node read 256 KB more, however many requests wait already."""
    async with cluster(database, talker, 1) as [node], connected(node) as (reader, writer):
        before, most = cycles(), 0
        reading = asyncio.create_task(to_the_end(reader))
        for _ in range(8):
            writer.write(b"GET /livez HTTP/1.1\r\n\r\n" * 10_000)
            await asyncio.wait({asyncio.create_task(writer.drain())}, timeout=0.5)
            most = max(most, cycles() - before)
        reading.cancel()
        writer.transport.abort()
        assert most < 100


async def test_chunks_of_one_byte_do_not_hold_the_loop(database: str, talker: Talker) -> None:
    """Of bodies that were refused for their Host already: each costs the parser a callback, however slowly it comes."""
    head = b"POST /mcp HTTP/1.1\r\nhost: evil.example\r\ncontent-type: application/json\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    async with cluster(database, talker, 1) as [node], contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(connected(node, head)) for _ in range(20)]
        for reader, _ in streams:
            assert b" 421 " in await asyncio.wait_for(reader.readline(), 10)
        async with longest_hold() as held:
            before = time.thread_time()
            for _, writer in streams:
                writer.write(b"1\r\n \r\n" * 100_000)
            for reader, _ in streams:
                await to_the_end(reader)
        assert time.thread_time() - before < 2
        assert held[0] < 5 * HELD


async def test_many_small_headers_are_too_large(database: str, talker: Talker) -> None:
    """Four times as many bytes as a head may have, in one read; each is a tuple that stays with the connection."""
    async with cluster(database, talker, 1) as [node], connected(node) as (reader, writer):
        line = b"a:\r\n"
        assert len(line) * 60_000 > 3 * HEAD_BYTES
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n" + line * 60_000 + b"\r\n")
        assert b" 431 " in await asyncio.wait_for(reader.readline(), 10)


@pytest.mark.parametrize("upgrade", ["h2c", "x"])
async def test_a_body_that_could_be_of_another_protocol_is_refused(database: str, talker: Talker, upgrade: str) -> None:
    """The parser does not tell it from what follows an upgrade; it was lost, and a request could hide in it."""
    ping = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}'
    async with cluster(database, talker, 1, response="json") as [node], RawSession() as session:
        await session.open(node.url)
        headers = f"mcp-session-id: {session.session_id}\r\nconnection: Upgrade\r\nupgrade: {upgrade}\r\n".encode()
        head = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:1\r\naccept: application/json, text/event-stream\r\n%s" % headers
        head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ping)
        async with connected(node, head + ping) as (reader, _):
            answer = await to_the_end(reader)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"without one" in answer
        bare = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: h2c\r\ncontent-length: 0\r\n\r\n"
        async with connected(node, bare) as (reader, _):
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)


async def test_no_request_hides_in_the_body_of_one_that_could_be_upgraded(database: str, talker: Talker) -> None:
    """A proxy that keeps connections and passes ``Upgrade`` on would give its answer to the next client."""
    inner = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    head = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:1\r\nconnection: Upgrade\r\nupgrade: x\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(inner)
    async with cluster(database, talker, 1) as [node], connected(node, head) as (reader, writer):
        await asyncio.sleep(0.2)  # a segment of its own
        writer.write(inner)
        got = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                while piece := await reader.read(65_536):
                    got += piece
        assert got.count(b"HTTP/1.1 ") == 1, got


SIZE = 40_000
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "x", "version": "1"},
    "x": "x" * (SIZE - 1000),
}
PARAMS = {"_meta": META, "notifications": {"toolsListChanged": True}}
LISTEN = {"jsonrpc": "2.0", "id": 1, "method": "subscriptions/listen", "params": PARAMS}
MODERN = {"mcp-protocol-version": "2026-07-28", "mcp-method": "subscriptions/listen"}


@pytest.mark.parametrize("addresses", [1, 4])
async def test_streams_that_listen_hold_no_room_for_their_bodies(database: str, talker: Talker, addresses: int) -> None:
    """What was handed to the SDK is neither stored nor answered, for hours: four idle streams for each caller."""
    async with cluster(database, talker, 1, max_body=SIZE) as [node], contextlib.AsyncExitStack() as stack:
        for number in range(addresses):
            address = {"x-forwarded-for": f"192.0.2.{number}"}
            modern = await stack.enter_async_context(RawSession(headers=MODERN | address))
            held = [await modern.post(node.url, LISTEN | {"id": each}) for each in range(4)]
            assert {each.status for each in held} == {200}, [each.body for each in held]
        whose = "192.0.2.0" if addresses == 1 else "192.0.2.9"
        session = await stack.enter_async_context(RawSession(headers={"x-forwarded-for": whose}))
        await session.open(node.url)
        params = {"name": "large", "arguments": {"size": 1, "x": "x" * 20_000}}
        answer = await session.request(node.url, "tools/call", params)
        assert answer.status == 200, answer.body
