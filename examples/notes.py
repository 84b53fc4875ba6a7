"""A FastMCP server whose state is in PostgreSQL: ``pgmcp up examples/notes.py:mcp`` (needs the extra ``fastmcp``)."""

import os

from fastmcp import Context, FastMCP
from key_value.aio.stores.postgresql import PostgreSQLStore

mcp = FastMCP("notes", session_state_store=PostgreSQLStore(url=os.environ["PGMCP_DATABASE_URL"]))


@mcp.tool
async def write(text: str, ctx: Context) -> int:
    """Keep a note of this session; how many it has now."""
    notes = [*(await ctx.get_state("notes") or []), text]
    await ctx.set_state("notes", notes)
    return len(notes)


@mcp.tool
async def read(ctx: Context) -> list[str]:
    """The notes of this session."""
    return await ctx.get_state("notes") or []
