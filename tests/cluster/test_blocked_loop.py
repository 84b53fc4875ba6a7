"""A tool that blocks the event loop is named in the log; one that is a plain function blocks nothing."""

from __future__ import annotations

import threading
import time

import pytest
from fastmcp import FastMCP
from mcp.server.mcpserver import MCPServer

from pgmcp.node import watchdog
from pgmcp.node.watchdog import Watchdog
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, cluster


def served(kind: type[MCPServer] | type[FastMCP]) -> MCPServer | FastMCP:
    server = kind("blocking")

    @server.tool()
    async def blocks(seconds: float) -> str:
        time.sleep(seconds)  # noqa: ASYNC251 - the commonest mistake
        return "done"

    @server.tool()
    def waits(seconds: float) -> str:
        time.sleep(seconds)
        return threading.current_thread().name

    return server


def dog(node: RunningNode) -> Watchdog:
    assert node.node.watchdog is not None
    return node.node.watchdog


async def test_a_tool_that_blocks_is_named(
    database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LOG_SECONDS", 0.0)  # on a busy machine an import may come first
    async with cluster(database, lambda: served(MCPServer), 2) as nodes, RawSession() as session:
        assert dog(nodes[0]) is dog(nodes[1]), "one for each event loop"
        await session.open(nodes[0].url)
        blocked = dog(nodes[0]).blocked
        await session.call_tool(nodes[1].url, "blocks", 20, seconds=watchdog.BLOCKED_SECONDS + 1)
        assert dog(nodes[0]).blocked > blocked
        said = [record.getMessage() for record in caplog.records if "in blocks\n" in record.getMessage()]
        assert "time.sleep(seconds)" in said[0]


@pytest.mark.parametrize("kind", [MCPServer, FastMCP])
async def test_a_plain_function_runs_in_a_thread(database: str, kind: type) -> None:
    """The SDKs do that; the loop goes on meanwhile."""
    async with cluster(database, lambda: served(kind), 1) as (node,), RawSession() as session:
        await session.open(node.url)
        ticked = node.incarnation.lease.ticked_at
        result = await session.call_tool(node.url, "waits", 20, seconds=1.2)
        assert "AnyIO worker thread" in str(result)
        assert node.incarnation.lease.ticked_at > ticked
