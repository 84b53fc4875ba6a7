"""A server whose tools leave an entry outside of the cluster each time that they run: the truth of these tests."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mcp.server.mcpserver import Context, MCPServer

from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode
from tests.harness.waiting import eventually

CALL = 10.0


class Ledger:
    """What ran, in every session on every node."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.gate = asyncio.Event()

    @property
    def twice(self) -> list[Any]:
        """What ran more than once."""
        return [entry for entry, count in Counter(self.ran).items() if count > 1]

    def server(self) -> MCPServer:
        """The server of one more node."""
        server = MCPServer("ledger")

        @server.tool(structured_output=False)
        async def run(text: str) -> str:
            """Return the text."""
            self.ran.append(text)
            return text

        @server.tool(structured_output=False)
        async def wait(text: str) -> str:
            """Return the text when the test lets go."""
            self.ran.append(text)
            await self.gate.wait()
            return text

        @server.tool(structured_output=False)
        async def fill(size: int) -> str:
            """Return a long text."""
            self.ran.append(size)
            return "x" * size

        @server.tool()
        async def echo(value: dict[str, Any]) -> dict[str, Any]:
            """Return the value."""
            self.ran.append(repr(value))
            return value

        @server.tool(structured_output=False)
        async def broken(kind: str) -> str:
            """Return what is no text."""
            self.ran.append(kind)
            return "\ud800"

        @server.tool(structured_output=False)
        async def flood(count: int, size: int, ctx: Context) -> str:
            """Report progress in many long messages."""
            for step in range(1, count + 1):
                await ctx.report_progress(step, count, "x" * size)
            self.ran.append("flood")
            return "done"

        @server.tool(structured_output=False)
        async def update(uris: list[str], ctx: Context) -> str:
            """Say that resources were updated."""
            for uri in uris:
                await ctx.session.send_resource_updated(uri)
            return "told"

        return server


async def run(session: RawSession, base: str, text: str) -> float:
    """Call ``run``, check the answer, and say how long it took."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    result = await session.call_tool(base, "run", CALL, text=text)
    assert result["content"][0]["text"] == text
    return loop.time() - start


@asynccontextmanager
async def sessions(nodes: Sequence[RunningNode], count: int) -> AsyncIterator[list[RawSession]]:
    """Sessions, whose owners are the nodes in turn."""
    found = [RawSession() for _ in range(count)]
    try:
        for number, session in enumerate(found):
            await session.open(nodes[number % len(nodes)].url)
        yield found
    finally:
        for session in found:
            await session.close()


@asynccontextmanager
async def load(
    nodes: Sequence[RunningNode],
    ledger: Ledger,
    weather: Callable[[int], Awaitable[None]],
    *,
    each: int,
    count: int = 4,
) -> AsyncIterator[list[float]]:
    """Call over all edges in turn, while the weather is made after every tenth run; check that each call ran once.

    Gives how long the calls took.
    """
    took: list[float] = []
    async with sessions(nodes, count) as opened:

        async def caller(number: int, session: RawSession) -> None:
            for turn in range(each):
                seconds = await run(session, nodes[(number + turn // 2) % len(nodes)].url, f"{number}/{turn}")
                took.append(seconds)

        async def maker() -> None:
            for turn in range(each * count // 10):

                def going(turn: int = turn) -> bool:
                    return len(ledger.ran) >= turn * 10 + 3

                await eventually(going, "calls go on", 20)
                await weather(turn)

        async with asyncio.TaskGroup() as group:
            group.create_task(maker())
            for number, session in enumerate(opened):
                group.create_task(caller(number, session))
    assert sorted(ledger.ran) == sorted(f"{number}/{turn}" for number in range(count) for turn in range(each))
    yield took


@asynccontextmanager
async def unread_flood(node: RunningNode, session: RawSession) -> AsyncIterator[asyncio.StreamReader]:
    """A call of ``flood`` that says 80 times 100,000 characters; its client reads what the test reads, then goes."""
    asked = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"flood",'
    asked += b'"arguments":{"count":80,"size":100000},"_meta":{"progressToken":1}}}'
    host, _, port = node.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    try:
        writer.write(
            b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:%s\r\ncontent-type: application/json\r\n"
            b"accept: application/json, text/event-stream\r\nmcp-session-id: %s\r\n"
            b"mcp-protocol-version: 2025-11-25\r\ncontent-length: %d\r\n\r\n%s"
            % (port.encode(), str(session.session_id).encode(), len(asked), asked)
        )
        yield reader
    finally:
        writer.transport.abort()
