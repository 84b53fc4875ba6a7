"""The server of the tests of deploys. Each run of a tool leaves a line in a file outside of the cluster: the truth."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ToolAnnotations
from pydantic import BaseModel

from pgmcp import SessionState, keep_memory, session_state

mcp = MCPServer("deploys", log_level="WARNING")
SAFE = ToolAnnotations(read_only_hint=True)
counts: dict[str, int] = {}


def note(what: str, text: str) -> None:
    """Leave a line: what happened, in which call, in which process."""
    line = json.dumps([what, text, os.getpid()]) + "\n"
    with Path(os.environ["TRUTH"]).open("a") as truth:
        truth.write(line)


async def work(text: str, seconds: float) -> str:
    note("start", text)
    await asyncio.sleep(seconds)
    note("end", text)
    return text


@mcp.tool(annotations=SAFE, structured_output=False)
async def safe(text: str, seconds: float = 0) -> str:
    """Return the text after a while."""
    return await work(text, seconds)


@mcp.tool(structured_output=False)
async def unsafe(text: str, seconds: float = 0) -> str:
    """Return the text after a while."""
    return await work(text, seconds)


@mcp.tool(structured_output=False)
async def unsafe_long(text: str, seconds: float) -> str:
    """Return the text after a while."""
    return await work(text, seconds)


@mcp.tool(structured_output=False)
async def announce(text: str, ctx: Context) -> str:
    """Tell the client, on the session's own stream, of a resource that nobody else is told of."""
    note("start", text)
    await ctx.session.send_resource_updated(f"test://{text}")
    return text


class Confirmation(BaseModel):
    ok: bool


@mcp.tool(annotations=SAFE, structured_output=False)
async def ask(text: str, ctx: Context) -> str:
    """Ask the user."""
    note("start", text)
    answer = await ctx.elicit(text, Confirmation)
    note("end", text)
    return f"{text}: {answer.action}"


async def counted() -> dict[str, Any]:
    """Count in memory and in what is kept."""
    state = session_state()
    await state.set("count", await state.get("count", 0) + 1)
    counts[state.session_id] = counts.get(state.session_id, 0) + 1
    return {"memory": counts[state.session_id], "kept": await state.get("count"), "restored": state.restored}


@mcp.tool()
async def count() -> dict[str, Any]:
    """Count in memory and in what is kept."""
    return await counted()


async def export(state: SessionState) -> int:
    return counts.get(state.session_id, 0)


async def restore(state: SessionState, exported: int | None) -> None:
    counts[state.session_id] = exported or 0


keep_memory(mcp, export=export, restore=restore)
