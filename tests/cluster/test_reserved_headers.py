"""What only the node itself may say: a client that says it is not believed, by any transport."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from litestar import Litestar
from mcp.server.mcpserver import Context, MCPServer

from pgmcp import ClusterPlugin
from pgmcp.session.adapter import RESTORED_HEADER
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, serving
from tests.harness.modern import Modern

SAYS = {RESTORED_HEADER: "1", "PGMCP-Restored": "2"}


def server() -> MCPServer:
    made = MCPServer("reserved")

    @made.tool()
    def restored(ctx: Context) -> list[str]:
        request = ctx.request_context.request
        assert request is not None
        return [value for name, value in request.headers.items() if name == RESTORED_HEADER]

    @made.tool()
    async def waits(ctx: Context) -> str:
        await asyncio.sleep(60)
        return "waited"

    return made


async def told(client: RawSession, base: str) -> Any:
    return (await client.call_tool(base, "restored"))["structuredContent"]["result"]


async def test_no_client_poses_as_a_replay(database: str) -> None:
    async with cluster(database, server, 2) as (one, two):
        async with RawSession(headers=SAYS) as client:
            await client.open(one.url)
            assert [await told(client, node.url) for node in (one, two)] == [[], []]
        async with Modern(SAYS) as modern:
            result = await modern.result(two.url, "restored")
            assert result["structuredContent"]["result"] == []
        async with RawSession(headers=SAYS, path="/sse") as client, httpx.AsyncClient(trust_env=False) as http:
            stream = await client.get(one.url)
            where = str((await stream.event()).data)
            info = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
            for body in (
                {"id": 0, "method": "initialize", "params": info},
                {"method": "notifications/initialized"},
                {"id": 1, "method": "tools/call", "params": {"name": "restored", "arguments": {}}},
            ):
                await http.post(f"{two.url}{where}", json={"jsonrpc": "2.0", **body}, headers=SAYS)
            answer = await stream.response(1)
            assert answer["result"]["structuredContent"]["result"] == []


async def test_nor_inside_another_application(database: str) -> None:
    app = Litestar(plugins=[ClusterPlugin(server(), database)], openapi_config=None)
    async with serving(app) as base, RawSession(headers=SAYS) as client:
        await client.open(base)
        assert await told(client, base) == []


@pytest.mark.parametrize("rpc_id", ["pgmcp-0", "pgmcp-1"])
async def test_an_id_like_the_nodes_own_is_answered_after_a_restore(database: str, rpc_id: str) -> None:
    async with cluster(database, server, 2) as nodes, RawSession() as client:
        await client.open(nodes[0].url)
        await client.call(nodes[0].url, "logging/setLevel", {"level": "error"})
        await nodes[0].leave()
        assert (await client.call(nodes[1].url, "ping", timeout=20))["result"] == {}
        assert nodes[1].actors, "it was restored here"
        async with await client.request(nodes[1].url, "ping", request_id=rpc_id) as exchange:
            assert "result" in await exchange.response(rpc_id)
