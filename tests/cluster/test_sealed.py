"""``--encrypt-payloads``: what clients and servers say lies nowhere in clear, and everything goes on as before."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp_types import ToolAnnotations

from pgmcp import keep_memory, session_state
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, cluster, tables_of
from tests.harness.waiting import eventually

MARKER = "mArKeR-0b5e"
SEALED: dict[str, Any] = {"secrets_key": "k" * 32, "encrypt_payloads": True}


def server() -> MCPServer:
    mcp = MCPServer("sealed")

    @mcp.tool()
    async def say(text: str, ctx: Context) -> str:
        with warnings.catch_warnings(action="ignore"):  # deprecated as of 2026-07-28
            await ctx.info(text)
        await ctx.report_progress(1, 2, text)
        await session_state().set("said", text)
        return text * 1000

    @mcp.tool(annotations=ToolAnnotations(read_only_hint=True))
    async def said() -> str:
        return str(await session_state().get("said"))

    async def export(_: object) -> str:
        return MARKER

    async def restore(_: object, exported: object) -> None:
        assert exported in {None, MARKER}

    keep_memory(mcp, export=export, restore=restore)
    return mcp


async def in_clear(tables: Tables) -> set[str]:
    """Where the marker lies."""
    dump = await tables.dump()
    return {place for place, values in dump.items() if any(MARKER.encode() in value for value in values)}


async def test_nothing_that_was_said_lies_in_clear(database: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(cluster(database, server, 2, **SEALED))
        tables = await stack.enter_async_context(tables_of(database))
        session = await stack.enter_async_context(RawSession())
        one, two = (node.url for node in nodes)
        session.client_info["title"] = MARKER
        await session.open(one)
        await session.call(two, "logging/setLevel", {"level": "info"})
        params = {"name": "say", "arguments": {"text": MARKER}, "_meta": {"progressToken": 1}}
        call = await session.request(two, "tools/call", params)
        events = await call.rest()
        assert MARKER * 1000 in str(call.messages[-1])
        resumed = await session.get(one, next(event.id for event in events if event.is_priming))
        await resumed.rest()
        assert resumed.messages == call.messages
        assert await in_clear(tables) == set()
        assert (
            await tables.value("select count(*) from pgmcp.events where substring(message from 1 for 1) = '\\x00'") > 3
        )

        nodes[0].node.draining = True
        await nodes[0].incarnation.host.export()
        assert await in_clear(tables) == set()
        await nodes[0].leave()
        again = await session.call_tool(two, "said")
        assert again["content"][0]["text"] == MARKER
        await eventually(lambda: nodes[1].incarnation.host.sessions == 1, "it lives there")


async def test_it_may_be_given_to_one_node_after_the_other(database: str) -> None:
    """What lies there in clear is read on, and what is sealed is read by those that do not seal."""
    async with (
        cluster(database, server, 1, secrets_key=SEALED["secrets_key"]) as (plain,),
        cluster(database, server, 1, **SEALED) as (sealing,),
        tables_of(database) as tables,
        RawSession() as session,
        RawSession() as other,
    ):
        await session.open(plain.url)
        await other.open(sealing.url)
        for base in (plain.url, sealing.url):
            for whose in (session, other):
                answer = await whose.call_tool(base, "say", text=MARKER)
                assert MARKER in str(answer)
        assert {"requests.body", "events.message", "journal.body"} == await in_clear(tables)
        await plain.leave()
        for whose in (session, other):
            assert (await whose.call_tool(sealing.url, "said"))["content"][0]["text"] == MARKER
