"""Two servers, ``sdk`` and ``fast``, whose handlers fail with what clients say and whose libraries log all they can."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import fastmcp
import mcp.server.mcpserver as official
from fastmcp import FastMCP
from mcp.server.mcpserver import MCPServer
from pydantic import BaseModel

from pgmcp.ops.redaction import LIBRARIES

SHOP = logging.getLogger("shop")


class Form(BaseModel):
    age: int


def equip(server: Any, context: Any) -> Any:
    """Give a server of either kind the same tools, prompts and resources."""

    @server.tool()  # type: ignore[untyped-decorator]  # of either kind
    def breaks(text: str) -> str:
        raise ValueError(text)

    @server.tool()  # type: ignore[untyped-decorator]  # of either kind
    def sells(text: str, count: int = 1) -> str:
        SHOP.warning("sold %s", text)
        warnings.warn(f"sold {count}", UserWarning, stacklevel=1)
        return "sold"

    @server.tool()  # type: ignore[untyped-decorator]  # of either kind
    async def tells(text: str, ctx: Any) -> str:
        await ctx.info(text)
        await ctx.report_progress(1, 2, text)
        return "told"

    tells.__annotations__["ctx"] = context

    async def asks(ctx: Any) -> str:
        return str(await ctx.elicit("How old?", Form))

    asks.__annotations__["ctx"] = context
    server.tool()(asks)

    def greets(name: str) -> str:
        raise ValueError(name)

    server.prompt()(greets)

    def note(name: str) -> str:
        raise ValueError(name)

    server.resource("note://{name}")(note)
    return server


sdk = equip(MCPServer("loud", log_level="DEBUG"), official.Context)
fast: FastMCP[Any] = equip(FastMCP("loud"), fastmcp.Context)


@sdk.completion()  # type: ignore[untyped-decorator]
async def complete(ref: Any, argument: Any, _: Any) -> Any:
    raise ValueError(argument.value)


for name in (*LIBRARIES, "pgmcp"):
    logging.getLogger(name).setLevel(logging.DEBUG)
