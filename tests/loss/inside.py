"""Two nodes in the test's own process, whose tools wait until the test lets them."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from mcp.server.mcpserver import Context, MCPServer

from pgmcp.clock import Clock
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, running_node
from tests.harness.waiting import eventually


class Truth:
    """What really ran, on all nodes; calls of ``wait`` end when the test lets them."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def server(self) -> MCPServer:
        """The server of one more node."""
        server = MCPServer("truth")

        @server.tool(structured_output=False)
        async def run(text: str) -> str:
            """Return the text."""
            self.ran[text] += 1
            return text

        @server.tool(structured_output=False)
        async def wait(text: str) -> str:
            """Return the text when the test lets go."""
            self.ran[text] += 1
            await self.gates[text].wait()
            return text

        @server.tool(structured_output=False)
        async def update(uri: str, ctx: Context) -> str:
            """Say that a resource was updated."""
            await ctx.session.send_resource_updated(uri)
            return "told"

        return server


@asynccontextmanager
async def two_nodes(url: str, truth: Truth, **settings: Any) -> AsyncIterator[list[RunningNode]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running_node(url, truth.server(), f"n{number}", Clock(), **settings))
            for number in (1, 2)
        ]


async def waiting(session: RawSession, node: RunningNode, truth: Truth, text: str) -> RawExchange:
    """A call of ``wait`` that has begun."""
    call = {"name": "wait", "arguments": {"text": text}}
    exchange = await session.request(node.url, "tools/call", call, request_id=text)
    await eventually(lambda: truth.ran[text], f"{text} runs")
    return exchange
