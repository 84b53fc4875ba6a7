"""Attacks that never worked: other sessions' streams and questions, injection, smuggling, SQL, rights."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from click.testing import CliRunner

from pgmcp.cli import main
from pgmcp.cli.round_robin_proxy import RoundRobinProxy
from pgmcp.clock import Clock
from pgmcp.errors import SettingsError
from pgmcp.settings import Settings
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, everything, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVIL = 'x\r\n\r\nevent: endpoint\r\ndata: {"jsonrpc":"2.0","id":1,"result":{}}\r\n\r\nid: 7\u2028\u2029\x85\x00'
ELICITS: dict[str, Any] = {"elicitation": {"form": {}}}


async def asked(session: RawSession, node: RunningNode) -> tuple[Any, Any]:
    """A call that waits for an answer, and its question."""
    call = {"name": "test_elicitation", "arguments": {"message": "who?"}}
    exchange = await session.request(node.url, "tools/call", call, request_id="asks")
    return exchange, await exchange.message("elicitation/create")


async def test_event_ids_of_other_sessions_open_nothing(pair: Sequence[RunningNode]) -> None:
    """Of the same caller, too: an event id is none of another session, and no way in of another transport."""
    async with (
        RawSession(capabilities=ELICITS) as mine,
        RawSession() as other,
        httpx.AsyncClient(trust_env=False, timeout=10) as http,
    ):
        for session in (mine, other):
            await session.open(pair[0].url)
        running, question = await asked(mine, pair[0])
        standalone = await mine.get(pair[0].url)
        for stolen in (running.seen[0].id, (await standalone.event()).id):
            for node in pair:
                refused = await other.get(node.url, stolen)
                assert refused.status in {204, 404}, "what an unknown stream gets"
                other_session = other.session_id
                other.session_id = None
                assert (await other.get(node.url, stolen)).status == 400
                other.session_id = other_session
                async with http.stream("GET", f"{node.url}/sse", headers={"last-event-id": str(stolen)}) as stream:
                    first = await anext(stream.aiter_text())
                    assert "session_id=" in first, "a session of its own"
                    assert str(mine.session_id) not in first
        assert standalone.error is None
        accepted = await mine.answer(pair[1].url, question, {"action": "decline"})
        assert accepted.status == 202
        assert "result" in await running.response("asks")


async def test_nobody_answers_anothers_question(pair: Sequence[RunningNode]) -> None:
    async with RawSession(capabilities=ELICITS) as mine, RawSession(capabilities=ELICITS) as other:
        for session in (mine, other):
            await session.open(pair[0].url)
        running, question = await asked(mine, pair[0])
        for node in pair:
            for forged in (
                {"result": {"action": "accept", "content": {"username": "eve"}}},
                {"error": {"code": 1, "message": "no"}},
            ):
                await other.post(node.url, {"jsonrpc": "2.0", "id": question["id"], **forged})
        await other.call(pair[1].url, "ping")
        await mine.call(pair[1].url, "ping")
        assert (await mine.answer(pair[1].url, question, {"action": "decline"})).status == 202
        answer = await running.response("asks")
        assert "eve" not in json.dumps(answer)
        assert "decline" in json.dumps(answer)


async def test_texts_end_no_events_and_no_headers(pair: Sequence[RunningNode]) -> None:
    rpc_id, call = f"7{EVIL}", {"name": "test_elicitation", "arguments": {"message": EVIL}}
    async with RawSession(capabilities=ELICITS) as session, httpx.AsyncClient(trust_env=False) as http:
        await session.open(pair[0].url)
        async with await session.request(pair[1].url, "tools/call", call, request_id=rpc_id) as exchange:
            question = await exchange.message("elicitation/create")
            assert question["params"]["message"] == EVIL
            await session.answer(pair[1].url, question, {"action": "decline"})
            assert "result" in await exchange.response(rpc_id)
            await exchange.rest()
            assert len(exchange.messages) == 2
            assert {event.event for event in exchange.seen if event.data} == {"message"}
        for header in ("mcp-session-id", "mcp-protocol-version", "last-event-id", "cookie"):
            evil = "a\xe9%0d%0aset-cookie: a=b".encode("latin-1")
            answer = await http.get(f"{pair[0].url}/mcp", headers={header.encode(): evil})
            assert answer.status_code >= 400
            assert not answer.cookies
            assert b"a=b" not in b"".join(value for _, value in answer.headers.raw)


# request smuggling

INNER = b"GET /smuggled HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
AMBIGUOUS = {
    "both lengths": b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" % (len(INNER) + 5) + INNER,
    "two lengths": b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(INNER) + INNER,
    "list of lengths": b"content-length: 0, %d\r\n\r\n" % len(INNER) + INNER,
    "a signed length": b"content-length: +%d\r\n\r\n" % len(INNER) + INNER,
    "a folded header": b"x: 1\r\n transfer-encoding: chunked\r\ncontent-length: %d\r\n\r\n0\r\n\r\n" % (len(INNER) + 5)
    + INNER,
    "a blank before the colon": b"transfer-encoding : chunked\r\ncontent-length: %d\r\n\r\n0\r\n\r\n" % (len(INNER) + 5)
    + INNER,
    "another coding": b"transfer-encoding: xchunked\r\ncontent-length: %d\r\n\r\n" % len(INNER) + INNER,
    "chunked not last": b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + INNER,
    "a long chunk size": b"transfer-encoding: chunked\r\n\r\n1" + b"0" * 16 + b"\r\n" + INNER,
    "a bare line feed": b"x: 1\ntransfer-encoding: chunked\r\ncontent-length: %d\r\n\r\n0\r\n\r\n" % (len(INNER) + 5)
    + INNER,
}


class Seen:
    """An application that notes which requests it gets."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        self.paths.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def behind_entry(seen: Seen) -> AsyncIterator[str]:
    async with serving(seen, lifespan="off") as base:
        entry = RoundRobinProxy({"n1": int(base.rpartition(":")[2])}, Clock(), print)
        async with serving(entry, lifespan="off") as url:
            yield url
        await entry.aclose()


async def spoken(url: str, head: bytes) -> bytes:
    at = urlsplit(url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    writer.write(b"POST /outer HTTP/1.1\r\nhost: 127.0.0.1\r\n" + head)
    writer.write_eof()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("way", ["node", "entry"])
async def test_no_request_hides_in_another(way: str) -> None:
    """What a proxy in front could read otherwise than the node is refused, or ends its connection."""
    seen = Seen()
    async with serving(seen, lifespan="off") if way == "node" else behind_entry(seen) as url:
        found = {name: await spoken(url, head) for name, head in AMBIGUOUS.items()}
    assert "/smuggled" not in seen.paths, {name: answer[:40] for name, answer in found.items()}
    assert all(answer.count(b"HTTP/1.1 ") <= 1 for answer in found.values())


# SQL


@pytest.mark.parametrize("name", ['a"; drop schema pgmcp; --', "a'b", "a.b", "pg_x", "A", "a\n", "x" * 42, "{a}", "%s"])
async def test_no_schema_name_is_sql(name: str, shared_database: str, tables: Tables) -> None:
    if name != "pg_x":
        with pytest.raises(SettingsError):
            Settings(schema_name=name)
    for words in (("db", "upgrade"), ("db", "current"), ("nodes",), ("drain", "n1")):
        done = await asyncio.to_thread(
            CliRunner().invoke, main, [*words, "--database-url", shared_database, "--schema", name]
        )
        assert done.exit_code == 2, (words, done.output)
    assert await tables.value("select to_regclass('pgmcp.sessions') is not null")


@pytest.mark.parametrize("name", ["a'; drop table pgmcp.nodes; --", 'a"', "a\r\nset-cookie: x", "a b", "é"])
async def test_no_node_name_is_sql_or_a_header(name: str, shared_database: str, tables: Tables) -> None:
    with pytest.raises(SettingsError):
        Settings(node_name=name)
    words = ["drain", name, "--no-wait", "--database-url", shared_database]
    assert (await asyncio.to_thread(CliRunner().invoke, main, words)).exit_code == 1
    assert await tables.value("select to_regclass('pgmcp.nodes') is not null")


# rights


@pytest.mark.parametrize("views", [False, True])
async def test_a_role_has_what_it_was_granted(views: bool, shared_database: str, tables: Tables) -> None:
    role, at = f"stranger_{secrets.token_hex(4)}", urlsplit(shared_database)
    shown = [row["viewname"] for row in await tables.rows("select viewname from pg_views where schemaname = 'pgmcp'")]
    await tables.execute(f"create role {role} login password 'x'")
    if views:
        await tables.execute(f"grant usage on schema pgmcp to {role}")
        for view in shown:
            await tables.execute(f"grant select on pgmcp.{view} to {role}")
    stranger = await asyncpg.connect(at._replace(netloc=f"{role}:x@{at.hostname}:{at.port}").geturl())
    try:
        for view in shown:
            if views:
                await stranger.fetch(f"select * from pgmcp.{view} limit 1")
            else:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await stranger.fetch(f"select * from pgmcp.{view} limit 1")
        for row in await tables.rows("select tablename from pg_tables where schemaname = 'pgmcp'"):
            for statement in ("select * from pgmcp.{}", "delete from pgmcp.{}"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await stranger.execute(statement.format(row["tablename"]))
        for call in ("publish_tools_list_changed()", "publish_resource_updated('x')", "in_use(1)"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await stranger.execute(f"select pgmcp.{call}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await stranger.execute("create table pgmcp.mine ()")
    finally:
        await stranger.close()
        await tables.execute(f"drop owned by {role}")
        await tables.execute(f"drop role {role}")


async def test_nodes_need_no_right_on_the_schema_but_to_its_rows(
    pair: Sequence[RunningNode], shared_database: str, tables: Tables
) -> None:
    """They run as another role than the one that migrates; what that one may do is SECURITY.md's row on the owner."""
    role, at = f"runs_{secrets.token_hex(4)}", urlsplit(shared_database)
    await tables.execute(f"create role {role} login password 'x'")
    await tables.execute(f"grant usage on schema pgmcp to {role}")
    await tables.execute(f"grant select, insert, update, delete on all tables in schema pgmcp to {role}")
    url = at._replace(netloc=f"{role}:x@{at.hostname}:{at.port}").geturl()
    try:
        async with cluster(url, everything, 1) as (node,), RawSession() as session:
            await session.open(node.url)
            for base in (node.url, pair[0].url):
                await session.call_tool(base, "count")
            assert (await session.delete(node.url)).status == 200
    finally:
        await tables.execute(f"drop owned by {role}")
        await tables.execute(f"drop role {role}")


async def test_what_runs_with_the_owners_rights_is_nobodys_unless_granted(tables: Tables) -> None:
    rows = await tables.rows(
        "select proname, proconfig, has_function_privilege('public', p.oid, 'execute') as anybody "
        "from pg_proc p join pg_namespace n on n.oid = pronamespace where nspname = 'pgmcp' and prosecdef"
    )
    assert rows
    for row in rows:
        assert not row["anybody"], row["proname"]
        assert row["proconfig"] == ["search_path=pg_catalog, pg_temp"], row["proname"]
