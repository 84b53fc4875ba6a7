"""A list in a string is what a client meant; a bomb in a string is not."""

from __future__ import annotations

import time

import pytest
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

import pgmcp.session.adapters.sdk  # noqa: F401 - serves the server

LISTS = ",".join(["[" * 90 + "]" * 90] * 22_000)
LIMIT = 0.25
"""Seconds of CPU, of which the SDK alone takes more than one."""


def server() -> MCPServer:
    made = MCPServer("lists")

    @made.tool()
    def count(numbers: list[int], text: str) -> int:
        return len(numbers) + len(text)

    return made


async def test_a_list_in_a_string_is_a_list() -> None:
    result = await server().call_tool("count", {"numbers": "[1, 2, 3]", "text": LISTS})
    assert f"{len(LISTS) + 3}" in str(result)


async def test_a_bomb_in_a_string_stays_a_string() -> None:
    made, began = server(), time.thread_time()
    with pytest.raises(ToolError):
        await made.call_tool("count", {"numbers": f"[{LISTS}]", "text": ""})
    assert time.thread_time() - began < LIMIT


async def test_many_strings_are_no_larger_than_one() -> None:
    made, lists = MCPServer("lists"), "[" + ",".join(["[]"] * 16_000) + "]"

    @made.tool()
    def join(a: list[object], b: list[object], c: list[object], d: list[object], e: list[object]) -> int:
        return len([*a, *b, *c, *d, *e])

    with pytest.raises(ToolError, match="4 validation errors"):
        await made.call_tool("join", dict.fromkeys("abcde", lists))
    assert "18" in str(await made.call_tool("join", {"a": f"[{'1,' * 9}1]"} | dict.fromkeys("bcde", "[1, 2]")))
