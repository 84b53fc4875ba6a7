"""Any text works in a database of any encoding."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.server.mcpserver import Context, MCPServer

from pgmcp import session_state
from pgmcp.store.commands import views
from pgmcp.store.connection.encoding import CODECS, Encoding, unescaped
from pgmcp.store.schema import migrations
from tests.conftest import ADDRESS
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, tables_of
from tests.harness.stores import IDS

NAMES = ("Иван", "José", "ひらがな", "🦉", "\\u{416}", "plain")
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture(params=["LATIN1", "SQL_ASCII", "WIN1251", "EUC_JP"])
async def encoded(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The address of a migrated database of another encoding."""
    server, name = os.environ[ADDRESS], f"test_{IDS.token()[:16]}"
    admin = await asyncpg.connect(server)
    await admin.execute(f"create database {name} encoding '{request.param}' template template0 locale 'C'")
    address = urlsplit(server)._replace(path=f"/{name}").geturl()
    await asyncio.to_thread(migrations.upgrade, address, "pgmcp")
    yield address
    await admin.execute(f"drop database {name} with (force)")
    await admin.close()


def server() -> MCPServer:
    made = MCPServer("сервер")

    @made.tool(structured_output=False)
    async def keep(key: str) -> str:
        """Keep something under a key, and read all of them."""
        await session_state().set(key, key)
        return str(await session_state().get(key))

    @made.tool(structured_output=False)
    async def update(uri: str, ctx: Context) -> str:
        """Publish a change."""
        await ctx.notify_resource_updated(uri)
        return "told"

    return made


@pytest.mark.usefixtures("either_way")
async def test_clients_tools_and_ids_may_have_any_name(encoded: str) -> None:
    async with cluster(encoded, server, 2) as nodes:
        for name in NAMES:
            async with RawSession() as session:
                session.client_info = {"name": name, "version": name}
                await session.open(nodes[0].url, nodes[1].url)
                params = {"name": f"tool {name}", "arguments": {}}
                exchange = await session.request(nodes[1].url, "tools/call", params, request_id=name)
                answer = await exchange.response(name)
                assert name in str(answer), answer
                kept = await session.call_tool(nodes[1].url, "keep", key=name)
                assert kept["content"][0]["text"] == name
                await session.request(nodes[1].url, "resources/subscribe", {"uri": f"test://{name}"})
                await session.call_tool(nodes[1].url, "update", uri=f"test://{name}")
        shown = await asyncio.to_thread(views.fetch, encoded, "pgmcp", "live_sessions")
        assert {row["client_name"] for row in shown} == set(NAMES)
    async with tables_of(encoded) as tables:
        assert await tables.value("select serves from pgmcp.cluster") in {
            "сервер",
            r"\u{441}\u{435}\u{440}\u{432}\u{435}\u{440}",
        }


@given(TEXTS, st.sampled_from([*CODECS, "EUC_JP", "UTF8"]))
def test_what_is_written_is_read(text: str, encoding: str) -> None:
    written = Encoding(encoding).given([text])
    assert isinstance(written, list)
    assert unescaped(written[0]) == text
    written[0].encode(CODECS.get(encoding, "ascii" if encoding == "EUC_JP" else "utf-8"))


async def test_the_server_takes_all_that_an_encoding_holds(database: str) -> None:
    """Python's tables and PostgreSQL's agree."""
    every = [chr(code) for code in range(128, 0x10000) if not 0xD800 <= code <= 0xDFFF]
    async with tables_of(database) as tables:
        for name, codec in CODECS.items():
            held = [each for each in every if each.encode(codec, "ignore")]
            assert await tables.value("select octet_length(convert_to($1, $2))", "".join(held), name) == len(held)
