"""A server whose calls last as long as a test wants, and which says as much as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import mcp_types as types
import pytest
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer

Message = types.LoggingMessageNotification


def log(data: str) -> Message:
    return Message(params=types.LoggingMessageNotificationParams(level="info", data=data))


class Talker:
    """Makes servers, one for each node; ``release`` lets every call of ``hold`` go on."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.running = 0

    def __call__(self) -> MCPServer:
        server = MCPServer("talker")
        server.tool()(self.hold)
        server.tool()(self.flood)
        server.tool()(self.large)
        server.tool(structured_output=False)(self.whole)
        server.tool()(self.update)
        server.tool()(self.burst)
        server.tool()(self.change)
        server.tool()(self.note)
        server.tool()(self.ask)
        server.tool()(self.roots)
        return server

    async def hold(self) -> str:
        """Run until the test lets go."""
        self.running += 1
        try:
            await self.release.wait()
        finally:
            self.running -= 1
        return "held"

    async def flood(self, count: int, size: int, ctx: Context) -> str:
        """Send many messages on the stream of the call."""
        for number in range(count):
            await ctx.session.send_notification(log(f"{number} ".ljust(size, "x")), related_request_id=ctx.request_id)
        return "flooded"

    async def large(self, size: int) -> str:
        """Answer with many bytes at once."""
        return "x" * size

    async def whole(self, size: int) -> str:
        """Answer with many bytes at once, as text only."""
        return "x" * size

    async def update(self, uris: list[str], ctx: Context) -> str:
        """Say on the standalone stream that resources have changed."""
        for uri in uris:
            await ctx.session.send_resource_updated(uri)
        return "updated"

    async def burst(self, uris: list[str], ctx: Context) -> str:
        """The same, all at once."""
        await asyncio.gather(*(ctx.session.send_resource_updated(uri) for uri in uris))
        return "updated"

    async def change(self, count: int, ctx: Context) -> str:
        """Say on the standalone stream that both lists have changed."""
        for _ in range(count):
            await ctx.session.send_tool_list_changed()
            await ctx.session.send_prompt_list_changed()
        return "changed"

    async def note(self, first: int, count: int, ctx: Context) -> str:
        """Send log messages on the standalone stream."""
        for number in range(first, first + count):
            await ctx.session.send_notification(log(str(number)))
        return "noted"

    async def ask(self, ctx: Context) -> str:
        """Ask the user on the stream of the call."""
        form = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
        answer = await ctx.session.elicit_form("?", form, related_request_id=ctx.request_id)
        return str(answer.action)

    async def roots(self, ctx: Context) -> int:
        """Ask for the roots on the standalone stream."""
        answer = await ctx.session.send_request(types.ListRootsRequest(), types.ListRootsResult)
        return len(answer.roots)


@pytest.fixture
async def talker() -> Talker:
    return Talker()


class Verifier:
    """A token is the name of its bearer."""

    async def verify_token(self, token: str) -> AccessToken:
        return AccessToken(token=token, client_id="client", scopes=["use"], subject=token, claims={"iss": "https://i"})


@pytest.fixture
def private() -> Callable[[], MCPServer]:
    """A server that wants to know who calls."""
    return lambda: MCPServer(
        "private",
        token_verifier=Verifier(),
        auth=AuthSettings.model_validate(
            {
                "issuer_url": "https://i",
                "resource_server_url": "https://mcp.example/mcp",
                "required_scopes": ["use"],
                "validate_token_resource": False,
            }
        ),
    )
