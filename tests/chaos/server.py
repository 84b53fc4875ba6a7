"""The server of these tests. Each run of a tool leaves a line in a file outside of the cluster: the truth."""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import mcp_types as types
from mcp.server import ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.session import ServerSession
from mcp_types import ToolAnnotations

from pgmcp import SessionState, keep_memory, session_state
from tests.harness.deploys import SAFE, Confirmation, counted, counts, export, note

mcp = MCPServer("chaos", log_level="WARNING")
IDEMPOTENT = ToolAnnotations(idempotent_hint=True)
LONG = 60.0
"""Seconds that a first run takes which somebody is to interrupt."""

levels: dict[str, str] = {}
subscribers: dict[str, ServerSession] = {}
bumping: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)


def noted(what: str, text: str) -> int:
    """Leave a line, as ``note`` does; how often the same has happened by now."""
    note(what, text)
    return Path(os.environ["TRUTH"]).read_text().count(json.dumps([what, text])[:-1] + ",")


async def work(text: str, first: float, again: float) -> str:
    """Run for a while, which may be another one in a later run; say in which process."""
    await asyncio.sleep(first if noted("start", text) == 1 else again)
    note("end", text)
    return f"{text} {os.getpid()}"


@mcp.tool(annotations=SAFE, structured_output=False)
async def safe(text: str, first: float = 0, again: float = 0) -> str:
    """Return the text after a while."""
    return await work(text, first, again)


@mcp.tool(annotations=IDEMPOTENT, structured_output=False)
async def repeatable(text: str, first: float = 0, again: float = 0) -> str:
    """Return the text after a while."""
    return await work(text, first, again)


@mcp.tool(structured_output=False)
async def unsafe(text: str, first: float = 0, again: float = 0) -> str:
    """Return the text after a while."""
    return await work(text, first, again)


@mcp.tool(structured_output=False)
async def named(text: str, first: float = 0, again: float = 0) -> str:
    """Return the text after a while; only the operator says that it is safe."""
    return await work(text, first, again)


@mcp.tool(annotations=SAFE, structured_output=False)
async def deadly(text: str) -> str:
    """Take the node down."""
    note("start", text)
    os._exit(1)


@mcp.tool(annotations=SAFE, structured_output=False)
async def steps(text: str, count: int, seconds: float, stall: int, ctx: Context) -> str:
    """Report progress step by step; the first run goes no further than the step ``stall``, later ones go faster."""
    first = noted("start", text) == 1
    for step in range(1, count + 1):
        await asyncio.sleep(seconds if first else seconds / 10)
        await ctx.report_progress(step, count, f"{step} {os.getpid()}")
        if first and step == stall:
            note("stall", text)
            await asyncio.sleep(LONG)
    note("end", text)
    return f"{text} {os.getpid()}"


@mcp.tool(structured_output=False)
async def mutter(text: str, ctx: Context) -> str:
    """Say something on the session's standalone stream now and then."""
    note("start", text)
    for step in range(300):
        await asyncio.sleep(0.2)
        words = types.LoggingMessageNotificationParams(level="info", data=f"{step} {os.getpid()}")
        await ctx.session.send_notification(types.LoggingMessageNotification(params=words))
    return text


@mcp.tool(annotations=SAFE, structured_output=False)
async def ask(text: str, ctx: Context) -> str:
    """Ask the user."""
    note("start", text)
    answer = await ctx.elicit(text, Confirmation)
    note("end", text)
    return f"{text} {answer.action}"


@mcp.tool()
async def count() -> dict[str, Any]:
    """Count in memory and in what is kept; tell what is known of the session."""
    session = session_state().session_id
    return {**await counted(), "level": levels.get(session), "subscribed": session in subscribers}


@mcp.tool(structured_output=False)
async def bump() -> str:
    """Add one to a number that is kept; tell the sum."""
    state = session_state()
    async with bumping[state.session_id]:
        told = await state.get("sum", 0) + 1
        await state.set("sum", told)
        return str(told)


@mcp.tool(structured_output=False)
async def touch() -> str:
    """Tell the session, if it has subscribed, that the resource has changed."""
    await subscribers[session_state().session_id].send_resource_updated("chaos://watched")
    return "touched"


@mcp.tool(structured_output=False)
async def mark(what: str) -> str:
    """Let each restore of this session take the process down (poison), or the first one never end (hang)."""
    await session_state().set(what, True)
    return what


async def set_level(_: ServerRequestContext[Any], params: types.SetLevelRequestParams) -> types.EmptyResult:
    levels[session_state().session_id] = params.level
    return types.EmptyResult()


async def subscribe(ctx: ServerRequestContext[Any], _: types.SubscribeRequestParams) -> types.EmptyResult:
    subscribers[session_state().session_id] = ctx.session
    return types.EmptyResult()


lowlevel = mcp._lowlevel_server
lowlevel.add_request_handler("logging/setLevel", types.SetLevelRequestParams, set_level)
lowlevel.add_request_handler("resources/subscribe", types.SubscribeRequestParams, subscribe)


async def restore(state: SessionState, exported: int | None) -> None:
    restores = noted("restore", state.session_id)
    if await state.get("poison"):
        os._exit(1)
    if await state.get("hang") and restores == 1:
        await asyncio.sleep(LONG)
    counts[state.session_id] = exported or 0


keep_memory(mcp, export=export, restore=restore)
