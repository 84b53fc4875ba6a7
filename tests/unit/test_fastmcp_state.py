"""A node says at its start what its FastMCP server forgets in a takeover, and what mends it."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
from fastmcp import FastMCP
from key_value.aio.stores.memory import MemoryStore
from mcp.server.mcpserver import MCPServer

from pgmcp.session.adapter import Shared
from pgmcp.session.target import target_of


@pytest.mark.parametrize(
    ("served", "forgets"),
    [
        (FastMCP("plain"), True),
        (FastMCP("in memory", session_state_store=MemoryStore()), True),
        (FastMCP("stored", session_state_store=cast("Any", object())), False),
        (MCPServer("without any"), False),
    ],
)
async def test_only_who_forgets_is_told_and_once(served: Any, forgets: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with target_of(served, "/mcp").adapter.lifespan(Shared(cast("Any", None))):
        pass
    said = [each for each in caplog.records if "set_state" in each.getMessage()]
    assert len(said) == forgets
    for each in said:
        assert each.levelno == logging.WARNING
        assert "session_state_store=PostgreSQLStore(url=" in each.getMessage()
        assert "from key_value.aio.stores.postgresql" in each.getMessage()
