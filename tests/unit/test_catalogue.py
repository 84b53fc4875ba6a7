"""The input schemas of a FastMCP server's tools, at hand without listing the tools before each call."""

from __future__ import annotations

from typing import Any

import pytest
from fastmcp import FastMCP

from pgmcp.session.adapters.fastmcp import FRESH_SECONDS, Catalogue
from pgmcp.session.target import target_of
from tests.harness.clock import FakeClock, settle


def add(a: int, b: int) -> int:
    return a + b


@pytest.fixture
def served() -> FastMCP[Any]:
    made: FastMCP[Any] = FastMCP("sums")
    made.tool(add)
    return made


async def looked(catalogue: Catalogue, name: str) -> Any:
    """What a lookup says after the reading that one before it began."""
    catalogue.schema(name)
    await settle()
    return catalogue.schema(name)


async def test_a_tool_that_comes_later_is_found_when_the_list_is_read_anew(served: FastMCP[Any]) -> None:
    clock = FakeClock()
    catalogue = Catalogue(served, clock)
    await catalogue.read()
    assert set((catalogue.schema("add") or {})["properties"]) == {"a", "b"}
    served.tool(add, name="later")
    assert await looked(catalogue, "later") is None
    await clock.advance(FRESH_SECONDS)
    assert await looked(catalogue, "later") is not None


async def test_a_list_that_cannot_be_read_leaves_what_was_known(
    served: FastMCP[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    catalogue = Catalogue(served, clock)
    await catalogue.read()

    async def broken(_: object) -> None:
        raise OSError("away")

    monkeypatch.setattr("pgmcp.session.adapters.fastmcp.Provider.list_tools", broken)
    await clock.advance(FRESH_SECONDS)
    assert await looked(catalogue, "add") is not None
    assert "could not be read" in caplog.text


async def test_the_sdk_asks_the_catalogue_instead_of_listing(served: FastMCP[Any]) -> None:
    target_of(served, "/mcp")
    assert served._mcp_server.get_tool_input_schema is not None
