"""A client that sends its body slowly holds its exchange for a bounded time, and nothing of what it sent is stored."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import pytest

from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, tables_of
from tests.limits.conftest import Talker

both = pytest.mark.parametrize("edge", [0, 1])
TIMEOUT, PACE = 0.5, 0.05
PING = b'{"jsonrpc": "2.0", "id": "slow", "method": "ping"}'
OPEN = {
    "length": [f"content-length: {len(PING)}"],
    "chunked": ["transfer-encoding: chunked"],
}


def head(base: str, path: str, *headers: str) -> bytes:
    """The headers of a POST."""
    accept = "accept: application/json, text/event-stream"
    host = [] if any(header.startswith("host:") for header in headers) else [f"host: {urlsplit(base).netloc}"]
    lines = [f"POST {path} HTTP/1.1", *host, accept, "content-type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


@asynccontextmanager
async def sending(base: str, path: str, *headers: str) -> AsyncIterator[socket.socket]:
    """A POST of which only the headers are sent. No stream: that forgets an answer behind which a reset comes."""
    at, loop = urlsplit(base), asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, (at.hostname, at.port))
        await loop.sock_sendall(client, head(base, path, *headers))
        yield client


async def drip(client: socket.socket, pieces: list[bytes]) -> bytes:
    """Send one piece at each pace until the answer begins; after the last one, wait for it. All of it, to its end."""
    loop = asyncio.get_running_loop()
    first = asyncio.create_task(loop.sock_recv(client, 1))
    for piece in pieces:
        with suppress(ConnectionError):
            await loop.sock_sendall(client, piece)
        if (await asyncio.wait({first}, timeout=PACE))[0]:
            break
    answer = await asyncio.wait_for(first, 10)
    with suppress(ConnectionResetError):  # the last piece came after the end of the answer
        while part := await asyncio.wait_for(loop.sock_recv(client, 65536), 10):
            answer += part
    return answer


@both
@pytest.mark.parametrize("how", OPEN)
@pytest.mark.parametrize("endless", [False, True], ids=["silent", "dripping"])
async def test_a_body_that_arrives_slowly(database: str, talker: Talker, edge: int, how: str, endless: bool) -> None:
    async with (
        cluster(database, talker, 2, read_timeout=TIMEOUT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        before = await tables.value("select count(*) from pgmcp.requests")
        piece = b"1\r\n \r\n" if how == "chunked" else b" "
        loop, base = asyncio.get_running_loop(), nodes[edge].url
        for path in ("/mcp", "/messages/?session_id=x"):
            start = loop.time()
            async with sending(base, path, f"mcp-session-id: {session.session_id}", *OPEN[how]) as client:
                answer = await drip(client, [piece] * (40 if endless else 1))
            assert TIMEOUT <= loop.time() - start < TIMEOUT + 4
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            error = json.loads(body)["error"]
            assert (error["code"], "0.5 s" in error["message"]) == (-32600, True)
            assert (await session.call(base, "ping"))["result"] == {}
        assert await tables.value("select count(*) from pgmcp.requests") == before + 2  # the pings


@both
async def test_a_body_in_pieces_that_arrives_in_time(database: str, talker: Talker, edge: int) -> None:
    async with cluster(database, talker, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        headers = [f"mcp-session-id: {session.session_id}", *OPEN["length"], "connection: close"]
        async with sending(nodes[edge].url, "/mcp", *headers) as client:
            answer = await drip(client, [PING[n : n + 10] for n in range(0, len(PING), 10)])
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b'"result":{}' in answer
