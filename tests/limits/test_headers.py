"""What comes before a body, and around it, has a limit in bytes and in time; so has the number of connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from pgmcp.node import http_protocol
from pgmcp.node.http_protocol import HEAD_BYTES, Proxies
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, cluster
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

PING = b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}'
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADERS_SECONDS", 0.3)
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 0.2)


@contextlib.asynccontextmanager
async def connected(node: RunningNode, first: bytes = b"") -> AsyncIterator[Streams]:
    at = urlsplit(node.url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    writer.write(first)
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def to_the_end(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection is closed; whoever still sends may find it reset."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(10):
            while piece := await reader.read(65_536):
                got += piece
    return got


@pytest.mark.parametrize(
    "start",
    [
        b"GET /mcp HTTP/1.1\r\nx: ",
        b"GET /",
        b"G" * 10,
        b"POST /mcp HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ",
    ],
    ids=["value", "path", "method", "trailer"],
)
async def test_endless_headers(database: str, talker: Talker, start: bytes) -> None:
    """As one long header, so that no parser's event tells of it."""
    sent = 0
    async with cluster(database, talker, 1) as [node], connected(node, start) as (reader, writer):
        answer = asyncio.create_task(to_the_end(reader))
        with contextlib.suppress(ConnectionError):
            while not answer.done() and sent < 100 * HEAD_BYTES:
                writer.write(b"x" * 10_000)
                sent += 10_000
                await writer.drain()
                await asyncio.sleep(0)
        await answer
        assert sent < 100 * HEAD_BYTES
        async with RawSession() as session:
            await session.open(node.url)


@pytest.mark.parametrize("count", [8, 5000], ids=["large", "many"])
async def test_headers_that_are_too_large(database: str, talker: Talker, count: int) -> None:
    line = b"x: " + b"y" * (2 * HEAD_BYTES // count) + b"\r\n"
    async with cluster(database, talker, 1) as [node], connected(node) as (reader, writer):
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n" + line * count + b"\r\n")
        assert b" 431 " in (await to_the_end(reader)).split(b"\r\n")[0]
        half = b"GET /livez HTTP/1.1\r\nhost: x\r\n" + line * (count // 16) + b"\r\n"
        async with connected(node, half) as (answer, _):
            assert b" 200 " in await asyncio.wait_for(answer.readline(), 10)


async def test_who_is_refused_for_headers_is_refused_no_faster_than_once_a_while(
    database: str, talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 2.0)
    async with cluster(database, talker, 1, max_connections=1, forwarded_allow_ips="10.0.0.1") as [node]:
        loop = asyncio.get_running_loop()
        async with connected(node, b"GET / HTTP/1.1\r\nx: %s\r\n\r\n" % (b"x" * 2 * HEAD_BYTES)) as (reader, _):
            assert b" 431 " in await asyncio.wait_for(reader.readline(), 10)
            told = loop.time()
            async with connected(node) as (other, _):
                assert b" 503 " in (await to_the_end(other)).split(b"\r\n")[0]
            assert b"too large" in await to_the_end(reader)
            assert loop.time() - told > 1


@pytest.mark.parametrize(
    "start", [b"GET /livez HTTP/1.1\r\nhost: x\r\n", b"P", b"\r\n"], ids=["header", "method", "line"]
)
async def test_headers_that_do_not_arrive(database: str, talker: Talker, start: bytes) -> None:
    async with cluster(database, talker, 1) as [node], connected(node, start) as (reader, writer):
        loop = asyncio.get_running_loop()
        began, answer = loop.time(), asyncio.create_task(to_the_end(reader))
        while not answer.done():
            writer.write(b"x" if start[:1] == b"G" else b"\r\n" if start[:1] == b"\r" else b"")
            await asyncio.wait({answer}, timeout=0.05)
            assert loop.time() < began + 10
        assert not answer.result() or b" 408 " in answer.result() or b" 400 " in answer.result()


async def test_the_rest_of_a_body_that_was_refused_does_not_last(database: str, talker: Talker) -> None:
    """413 is said at once; whoever goes on dripping is let go, and whoever sends it may use the connection again."""
    head = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:1\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n"
    async with cluster(database, talker, 1, max_body=1000) as [node]:
        async with connected(node, head) as (reader, writer):
            assert b" 413 " in await asyncio.wait_for(reader.readline(), 10)
            answer = asyncio.create_task(to_the_end(reader))
            for _ in range(200):
                writer.write(b" ")
                if (await asyncio.wait({answer}, timeout=0.05))[0]:
                    break
            assert answer.done()
        async with connected(node, head + b" " * 5000) as (reader, writer):
            await asyncio.wait_for(reader.readuntil(b'bytes"}}'), 10)
            writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)


async def test_what_follows_a_body_is_no_header(database: str, talker: Talker) -> None:
    async with cluster(database, talker, 1, response="json") as [node], RawSession() as session:
        await session.open(node.url)
        accept = b"accept: application/json\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
        first = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:1\r\n%s\r\n%x\r\n%s\r\n" % (accept, len(PING), PING)
        async with connected(node, first) as (reader, writer):
            writer.write(b"0\r\nmcp-session-id: %s\r\n\r\n" % str(session.session_id).encode())
            assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)


async def test_idle_connections_and_streams_outlast_the_time_for_headers(database: str, talker: Talker) -> None:
    async with cluster(database, talker, 1) as [node], RawSession() as session, connected(node) as (reader, writer):
        await session.open(node.url)
        stream = await session.get(node.url)
        await asyncio.sleep(0.4)
        for _ in range(2):
            writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            await asyncio.wait_for(reader.read(1000), 10)
            await asyncio.sleep(0.4)
        await session.call_tool(node.url, "change", count=1)
        await stream.message("notifications/tools/list_changed")


async def test_connections_of_one_address(database: str, talker: Talker) -> None:
    async with (
        cluster(database, talker, 1, max_connections=3, forwarded_allow_ips="10.0.0.1") as [node],
        contextlib.AsyncExitStack() as stack,
    ):
        first = [await stack.enter_async_context(connected(node)) for _ in range(3)]
        async with connected(node) as (reader, _):
            answer = await to_the_end(reader)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        first[0][1].close()

        async def served() -> bool:
            async with connected(node, b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n") as (reader, _):
                return b" 200 " in (await to_the_end(reader)).split(b"\r\n")[0]

        await eventually(served, "there is room for another")


async def test_trusted_proxies_have_as_many_as_they_want(database: str, talker: Talker) -> None:
    async with (
        cluster(database, talker, 1, max_connections=1) as [node],  # 127.0.0.1 is trusted
        connected(node),
        connected(node),
        RawSession() as session,
    ):
        await session.open(node.url)


def test_proxies() -> None:
    assert "10.1.2.3" in Proxies("*")
    named = Proxies("127.0.0.1, 10.0.0.0/8,fd00::/8, balancer")
    assert [host in named for host in ("127.0.0.1", "10.1.2.3", "fd00::1", "11.0.0.1", "::1", "balancer")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
