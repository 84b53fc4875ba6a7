"""One node by its options alone: a factory beside its neighbour, middleware around it, a free port."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.harness.clients import RawSession, connect
from tests.harness.cluster import tables_of
from tests.harness.processes import NodeProcess, free_ports

SERVER = """
import asyncio

from mcp.server.mcpserver import MCPServer
from neighbour import add

async def make():
    server = MCPServer("made", lifespan=None)
    lock = asyncio.get_running_loop()

    @server.tool()
    async def same_loop() -> bool:
        return asyncio.get_running_loop() is lock

    server.add_tool(add)
    return server
"""
NEIGHBOUR = """
from starlette.middleware.base import BaseHTTPMiddleware

def add(a: int, b: int) -> int:
    return a + b

class Stamp:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def stamped(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-stamp", self.name)]}
            await send(message)

        await self.app(scope, receive, stamped if scope["type"] == "http" else send)

    name = b"outer"

class Inner(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        response = await call_next(request)
        response.headers["x-stamp"] = "inner"
        return response
"""


async def test_a_factory_is_served_within_its_middleware(database: str, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(SERVER)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    [port] = free_ports(1)
    args = ["--factory", "--middleware", f"{tmp_path}/neighbour.py:Stamp, neighbour:Inner", "--host", "0.0.0.0"]
    args += ["--cors-origins", "http://localhost:6274"]
    target = f"{tmp_path / 'json.py'}:make"
    with NodeProcess(target, database_url=database, name="n", port=port, log_dir=tmp_path, args=args) as node:
        async with connect(node.mcp_url) as client:
            assert (await client.call_tool("add", {"a": 1, "b": 2})).structured_content == {"result": 3}
            assert (await client.call_tool("same_loop", {})).structured_content == {"result": True}
        async with RawSession() as session:
            await session.open(node.url)
            stream = await session.get(node.url, headers={"origin": "http://localhost:6274"})
            assert stream.headers.get_list("x-stamp") == ["inner", "outer"]
            assert stream.headers["access-control-allow-origin"] == "http://localhost:6274"
        async with httpx.AsyncClient(verify=False) as http:
            asked = {"origin": "http://localhost:6274", "access-control-request-method": "POST"}
            assert (await http.options(node.mcp_url, headers=asked)).status_code == 200
        async with tables_of(database) as tables:
            address = await tables.value("select address from pgmcp.live_nodes")
            assert address.endswith(f":{port}")
            assert not address.startswith("0.0.0.0")
        assert node.terminate() == 0
