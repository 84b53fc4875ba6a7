"""Several nodes in one event loop, each with its own real HTTP server: quick, and open to the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from pgmcp.clock import Clock
from pgmcp.node import Incarnation, Node
from pgmcp.session.adapters.target import load
from pgmcp.settings import Settings
from pgmcp.types import SessionKey

START = 20.0
EXAMPLES = Path(__file__).parents[2] / "examples"


def everything() -> object:
    """A fresh everything server: the memory of one more process."""
    return load(f"{EXAMPLES / 'everything.py'}:mcp")


@dataclass(slots=True)
class RunningNode:
    """A node and where it listens."""

    node: Node
    url: str

    @property
    def incarnation(self) -> Incarnation:
        """The node's present incarnation."""
        return self.node.incarnation()


@contextlib.asynccontextmanager
async def cluster(
    database: str, served: Callable[[], object], count: int = 2, clock: Callable[[], Clock] = Clock, **settings: Any
) -> AsyncIterator[Sequence[RunningNode]]:
    """Run ``count`` nodes, each serving an object of its own from ``served``."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running_node(database, served(), f"n{number}", clock(), **settings))
            for number in range(1, count + 1)
        ]


@contextlib.asynccontextmanager
async def running_node(
    database: str, served: object, name: str, clock: Clock, **settings: Any
) -> AsyncIterator[RunningNode]:
    """Run one node on a free port until the context ends."""
    node = Node(Settings(database_url=database, node_name=name, port=0, **settings), served, clock=clock)
    config = uvicorn.Config(
        node.application(), port=0, access_log=False, log_level="warning", lifespan="on", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(START):
            while not server.started:
                if task.done():
                    await task
                    message = f"node {name} did not start"
                    raise RuntimeError(message)
                await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield RunningNode(node, f"http://127.0.0.1:{port}")
    finally:
        node.stop_streams()
        server.should_exit = True
        await asyncio.wait({task}, timeout=START)


def owner_of(nodes: Sequence[RunningNode], session: SessionKey) -> RunningNode:
    """The node that runs a session's actor."""
    return next(node for node in nodes if session in node.incarnation.host._residents)
