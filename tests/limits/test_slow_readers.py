"""A client that does not read costs its node a bounded amount of memory for a bounded time, and loses nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

both = pytest.mark.parametrize("edge", [0, 1])
TIMEOUT = 0.5


@asynccontextmanager
async def deaf(
    node: RunningNode, session: RawSession, head: str, body: bytes = b"", *, tight: bool = False
) -> AsyncIterator[socket.socket]:
    """Send an exchange and read nothing of what comes; ``tight``: the node's kernel keeps nearly nothing of it."""
    at = urlsplit(node.url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (at.hostname, at.port))
    if tight:
        await eventually(lambda: tightened(client), "the node has the connection")
    lines = [
        head,
        f"host: {at.netloc}",
        f"mcp-session-id: {session.session_id}",
        "accept: application/json, text/event-stream",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    await loop.sock_sendall(client, "\r\n".join([*lines, "", ""]).encode() + body)
    try:
        yield client
    finally:
        client.close()


def call(name: str, request_id: object, **arguments: object) -> bytes:
    params = {"name": name, "arguments": arguments}
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}).encode()


def transports() -> set[Any]:
    """The transports of this process."""
    selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    handles = [key.data for key in selector.get_map().values()]
    return {handle._callback.__self__ for pair in handles for handle in pair or () if handle is not None
            if hasattr(getattr(handle._callback, "__self__", None), "get_write_buffer_size")}  # fmt: skip


def buffered(nodes: Sequence[RunningNode]) -> int:
    """Bytes that wait in the transports of this process."""
    return sum(transport.get_write_buffer_size() for transport in transports())


def tightened(client: socket.socket) -> bool:
    """Make the kernel's buffer of the other end of a connection as small as it can be."""
    for transport in transports():
        if transport.get_extra_info("peername") == client.getsockname():
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            return True
    return False


async def first_event(node: RunningNode, session: RawSession, tables: Tables) -> str:
    """The id that a client of the only call would have got first."""
    stream = await tables.value("select stream from pgmcp.requests where rpc_id = '\"big\"'")
    return f"{stream.hex}.0"


@both
async def test_a_client_that_does_not_read_its_answer(
    database: str, talker: Talker, edge: int, caplog: pytest.LogCaptureFixture
) -> None:
    count, size = 60, 200_000
    async with (
        cluster(database, talker, 2, write_timeout=TIMEOUT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
        RawSession() as other,
    ):
        await session.open(nodes[0].url)
        await other.open(nodes[edge].url)
        async with deaf(nodes[edge], session, "POST /mcp HTTP/1.1", call("flood", "big", count=count, size=size)):
            await eventually(lambda: len(nodes[edge].incarnation.open_streams) == 1, "the exchange runs")
            peak, loop = 0, asyncio.get_running_loop()
            start = loop.time()

            async def let_go() -> bool:
                nonlocal peak
                peak = max(peak, buffered(nodes))
                assert (await other.call(nodes[edge].url, "ping", timeout=2))["result"] == {}
                return len(nodes[edge].incarnation.open_streams) == 0

            await eventually(let_go, "the exchange ends")
            assert loop.time() - start < TIMEOUT + 4
            assert peak < 16 << 20, f"{peak} bytes wait for one client"  # one page of 64 events at most
            sinks = "select count(*) from pgmcp.streams where sink is not null"
            await eventually(lambda: zero(tables, sinks), "its stream is free")
            done = "select count(*) from pgmcp.requests where finished_at is null"
            await eventually(lambda: zero(tables, done), "the call ran on to its end")
            resumed = await session.get(nodes[1 - edge].url, await first_event(nodes[edge], session, tables))
            assert resumed.status == 200
            await resumed.rest()
            *flood, answer = resumed.messages
            assert [message["params"]["data"].split()[0] for message in flood] == [*map(str, range(count))]
            assert answer["result"]["content"][0]["text"] == "flooded"
            assert [len(message["params"]["data"]) for message in flood] == [size] * count
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors in ([], ["ASGI callable returned without completing response."])  # uvicorn's word for an abrupt end


async def zero(tables: Tables, query: str) -> bool:
    return bool(await tables.value(query) == 0)


@both
async def test_the_connection_of_a_client_that_does_not_read_is_closed(
    database: str, talker: Talker, edge: int
) -> None:
    """Closing waits for what is in the buffer, so a peer that never reads has to be aborted."""
    async with cluster(database, talker, 2, write_timeout=TIMEOUT) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        async with deaf(nodes[edge], session, "POST /mcp HTTP/1.1", call("flood", "big", count=64, size=200_000)):
            await eventually(lambda: len(nodes[edge].incarnation.open_streams) == 1, "the exchange runs")
            await eventually(lambda: len(nodes[edge].incarnation.open_streams) == 0, "the exchange ends")
            await eventually(lambda: buffered(nodes) == 0, "nothing waits for the client any more", 3)


@both
async def test_a_deaf_listener(database: str, talker: Talker, edge: int) -> None:
    """What waits on the standalone stream of a client that does not read comes to the connection that does."""
    count, size = 40, 100_000
    async with (
        cluster(database, talker, 2, write_timeout=TIMEOUT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        async with deaf(nodes[edge], session, "GET /mcp HTTP/1.1"):
            await eventually(lambda: len(nodes[edge].incarnation.open_streams) == 1, "the exchange runs")
            uris = [f"test://{number}/{'x' * size}" for number in range(count)]
            await session.call_tool(nodes[edge].url, "update", uris=uris)
            await eventually(lambda: len(nodes[edge].incarnation.open_streams) == 0, "the exchange ends")
            stream = await tables.value("select id from pgmcp.streams where kind = 'standalone'")
            listening = await session.get(nodes[1 - edge].url, f"{stream.hex}.0")
            got = [(await listening.message("notifications/resources/updated"))["params"]["uri"] for _ in uris]
            assert got == uris


async def test_a_page_has_a_bound_in_bytes(database: str, talker: Talker) -> None:
    """An exchange reads a page at a time; large messages must not make it a hundred megabytes."""
    async with (
        cluster(database, talker, 1, write_timeout=20) as [node],
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(node.url)
        call_ = await session.request(
            node.url, "tools/call", {"name": "flood", "arguments": {"count": 64, "size": 400_000}}, request_id="big"
        )
        await call_.close()
        done = "select count(*) from pgmcp.requests where finished_at is null"
        await eventually(lambda: zero(tables, done), "the call ran to its end")
        head = f"GET /mcp HTTP/1.1\r\nlast-event-id: {await first_event(node, session, tables)}"
        async with deaf(node, session, head):
            await eventually(lambda: buffered([node]) > 0, "the first page is there")
            assert buffered([node]) < 8 << 20


@both
@pytest.mark.parametrize("response", ["sse", "json", "auto"])
async def test_one_large_answer_that_nobody_reads(database: str, talker: Talker, edge: int, response: str) -> None:
    """It goes out in pieces, each with a deadline, the last one too: nothing of it stays with the node."""
    size = 1 << 20
    async with (
        cluster(database, talker, 2, write_timeout=TIMEOUT, response=response) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        asked = call("large", "big", size=size)
        async with deaf(nodes[edge], session, "POST /mcp HTTP/1.1", asked, tight=True):
            answered = "select count(*) from pgmcp.requests where rpc_id = '\"big\"' and finished_at is not null"
            await eventually(lambda: tables.value(answered), "the answer is there")
            await eventually(lambda: len(nodes[edge].incarnation.open_streams) == 0, "the exchange ends", TIMEOUT + 4)
            await eventually(lambda: buffered(nodes) == 0, "nothing waits for the client any more", 3)
            sinks = "select count(*) from pgmcp.streams where sink is not null"
            await eventually(lambda: zero(tables, sinks), "its stream is free")
        resumed = await session.get(nodes[1 - edge].url, await first_event(nodes[edge], session, tables))
        assert len((await resumed.response("big"))["result"]["content"][0]["text"]) == size


@pytest.mark.parametrize("response", ["sse", "json"])
async def test_a_client_that_reads_slowly_gets_all_of_a_large_answer(
    database: str, talker: Talker, response: str
) -> None:
    """The deadline is one for progress, not for a piece: this client takes longer than the deadline for each."""
    size, patience = 80_000, 0.25
    async with (
        cluster(database, talker, 1, write_timeout=patience, response=response) as [node],
        RawSession() as session,
    ):
        await session.open(node.url)
        loop = asyncio.get_running_loop()
        asked = call("large", "big", size=size)
        async with deaf(node, session, "POST /mcp HTTP/1.1", asked, tight=True) as client:
            start, got = loop.time(), 0
            while got < 2 * size:  # as text and as structured content
                await asyncio.sleep(patience / 6)
                piece = await asyncio.wait_for(loop.sock_recv(client, 4096), 5)
                assert piece, f"cut after {got} bytes and {loop.time() - start} s"
                got += len(piece)
            assert loop.time() - start > 4 * patience
