"""A node that serves one era only: exchanges of the other one are told so, and clients that speak both go on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mcp import MCPError
from mcp.server.mcpserver import MCPServer

from pgmcp.errors import SettingsError
from pgmcp.settings import Settings
from tests.harness.clients import RawSession, connect
from tests.harness.cluster import cluster
from tests.harness.modern import Modern

SESSIONS = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"]


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def adding() -> MCPServer:
    server = MCPServer("adding")
    server.add_tool(add)
    return server


async def sum_of(url: str, mode: str) -> Any:
    async with connect(f"{url}/mcp", mode=mode) as client:
        return (await client.call_tool("add", {"a": 1, "b": 2})).structured_content


async def test_the_era_without_sessions_is_off(database: str) -> None:
    async with cluster(database, adding, 1, eras="legacy") as [node], Modern() as client:
        for version in ("2026-07-28", "2099-01-01"):
            answer = await client.request(node.url, "server/discover", version=version)
            assert answer.status == 400
            refused = json.loads(answer.body)
            assert (refused["id"], refused["error"]["code"]) == (1 if version < "2099" else 2, -32022)
            assert refused["error"]["data"] == {"supported": SESSIONS, "requested": version}
        assert await sum_of(node.url, "legacy") == await sum_of(node.url, "auto") == {"result": 3}
        async with RawSession(path="/sse") as older:
            assert (await older.get(node.url)).status == 200


async def test_the_era_of_sessions_is_off(database: str) -> None:
    async with cluster(database, adding, 1, eras=("modern",)) as [node], RawSession() as session:
        for message, requested in (
            ({"id": "a", "method": "initialize", "params": {"protocolVersion": "2025-06-18"}}, "2025-06-18"),
            ({"id": 2, "method": "ping"}, "2025-03-26"),
            ({"method": "notifications/initialized"}, "2025-03-26"),
        ):
            answer = await session.post(node.url, {"jsonrpc": "2.0", **message})
            assert answer.status == 400
            refused = json.loads(answer.body)
            assert (refused["id"], refused["error"]["code"]) == (message.get("id"), -32022)
            assert refused["error"]["data"] == {"supported": ["2026-07-28"], "requested": requested}
        assert (await session.get(node.url)).status == 405
        async with RawSession(path="/sse") as older:
            assert (await older.get(node.url)).status == 404
        assert await sum_of(node.url, "auto") == {"result": 3}
        with pytest.RaisesGroup(pytest.RaisesExc(MCPError, match="speaks 2026-07-28"), flatten_subgroups=True):
            await sum_of(node.url, "legacy")


@pytest.mark.parametrize("eras", ["", "sse", ("legacy", "older")])
def test_other_eras_are_refused(eras: Any) -> None:
    with pytest.raises(SettingsError, match="eras"):
        Settings(eras=eras)
