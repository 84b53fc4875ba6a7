"""The FastMCP server of the tests: with callers, a lifespan, and state in PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastmcp import Context, FastMCP
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier
from fastmcp.server.dependencies import get_access_token
from key_value.aio.stores.postgresql import PostgreSQLStore
from mcp_types import ElicitRequest, ElicitRequestFormParams, InputRequiredResult
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from pgmcp import session_state

CALLERS = {name: {"client_id": f"client-{name}", "sub": name, "scopes": ["use"]} for name in ("ada", "bob")}


def note(what: str) -> None:
    with Path(os.environ["TRUTH"]).open("a") as truth:
        truth.write(json.dumps([what, os.getpid()]) + "\n")


@asynccontextmanager
async def lifespan(_: FastMCP[Any]) -> AsyncIterator[dict[str, int]]:
    note("lifespan")
    yield {"pid": os.getpid()}


mcp: FastMCP[Any] = FastMCP(
    "fast",
    lifespan=lifespan,
    auth=StaticTokenVerifier(CALLERS, required_scopes=["use"]) if os.environ.get("FAST_AUTH") else None,
    session_state_store=PostgreSQLStore(url=os.environ["PGMCP_DATABASE_URL"]),
)


@mcp.tool
async def count(ctx: Context) -> dict[str, Any]:
    """Count, and say what is known of the session and of the caller."""
    counted = (await ctx.get_state("count") or 0) + 1
    await ctx.set_state("count", counted)
    token = get_access_token()
    state = session_state(ctx)
    await state.set("count", await state.get("count", 0) + 1)
    return {
        "kept": await state.get("count"),
        "count": counted,
        "session": ctx.session_id,
        "transport": ctx.transport,
        "who": token and token.client_id,
        "pid": (ctx.lifespan_context or {}).get("pid"),
    }


@mcp.tool
async def log(ctx: Context) -> str:
    """Log at two levels."""
    await ctx.debug("quiet")
    await ctx.error("loud")
    return "logged"


@mcp.tool(annotations={"readOnlyHint": True})
async def wait(seconds: float) -> str:
    """Return after a while."""
    await asyncio.sleep(seconds)
    return "waited"


@mcp.tool
async def whoami(ctx: Context) -> dict[str, Any]:
    """Say what is known without a session."""
    token = get_access_token()
    return {"transport": ctx.transport, "who": token and token.client_id}


@mcp.tool
async def confirm(ctx: Context) -> str | InputRequiredResult:
    """Ask, and answer when the answer came with the state."""
    if ctx.request_state == "asked":
        return "confirmed"
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
    form = ElicitRequest(params=ElicitRequestFormParams(message="Really?", requested_schema=schema))
    return InputRequiredResult(input_requests={"ok": form}, request_state="asked")


@mcp.custom_route("/hello", methods=["GET"])
async def hello(_: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")
