"""The server of ``pgmcp demo``: what its tools do shows what becomes of a session when its node dies."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ToolAnnotations

from pgmcp import session_state

mcp = MCPServer("demo", log_level="WARNING")
in_memory: dict[str, int] = {}


def note(order: str) -> None:
    """Write into the ledger that money was taken."""
    line = json.dumps({"order": order, "process": os.getpid()})
    with Path(os.environ["DEMO_LEDGER"]).open("a") as ledger:
        ledger.write(f"{line}\n")


@mcp.tool()
async def count() -> dict[str, int]:
    """Count this session's calls twice: in the memory of this process, and in what pgmcp keeps of the session."""
    state = session_state()
    in_memory[state.session_id] = in_memory.get(state.session_id, 0) + 1
    kept = await state.get("calls", 0) + 1
    await state.set("calls", kept)
    return {"memory": in_memory[state.session_id], "kept": kept}


@mcp.tool(annotations=ToolAnnotations(read_only_hint=True))
async def survey(steps: int, seconds: float, ctx: Context) -> dict[str, int]:
    """Look at something for a while, step by step; it changes nothing, so it may run again."""
    for step in range(1, steps + 1):
        await asyncio.sleep(seconds)
        await ctx.report_progress(step, steps)
    return {"steps": steps, "process": os.getpid()}


@mcp.tool()
async def charge(order: str, seconds: float, ctx: Context) -> dict[str, Any]:
    """Take money: a line in a ledger outside of the cluster. It must never happen twice by itself."""
    note(order)
    await ctx.report_progress(1, 2)
    await asyncio.sleep(seconds)
    return {"order": order, "charged": True}
