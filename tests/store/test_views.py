"""The public views show what operators ask for, in values that JSON can carry."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest
from click.testing import CliRunner, Result

from pgmcp.cli import main
from pgmcp.errors import DatabaseUnavailable, SchemaError, SettingsError
from pgmcp.store.commands import views
from pgmcp.store.schema import migrations
from pgmcp.store.schema.public_views import COLUMNS
from pgmcp.types import session_alias

A, B, GONE = ("00000000-0000-7000-8000-00000000000" + digit for digit in "abc")
S1, S2, S3 = ("00000000-0000-7000-8000-00000000010" + digit for digit in "123")

ROWS = f"""
insert into pgmcp.nodes (node_id, name, address, state, expires_at, version, schema_revision) values
  ('{A}', 'a', '127.0.0.1:1', 'ready', clock_timestamp() + interval '10 s', '0.1.0', '0001'),
  ('{B}', 'b', '127.0.0.1:2', 'dead', clock_timestamp() - interval '10 s', '0.1.0', '0001');
insert into pgmcp.sessions (session_id, owner, epoch, transport, client_name, principal_client, principal_issuer,
                            principal_subject) values
  ('first', '{A}', 3, 'streamable', 'probe', 'cli', 'https://issuer', 'me'),
  ('second', '{B}', 1, 'sse', null, null, null, null);
insert into pgmcp.streams (id, session, kind, sink, next_seq, delivered_seq, closed) values
  ('{S1}', 1, 'request', '{A}', 5, 2, false),
  ('{S2}', 1, 'standalone', null, 1, 0, false),
  ('{S3}', 1, 'request', '{A}', 2, 1, true);
insert into pgmcp.events (stream, seq, message) select '{S1}', seq, '' from generate_series(1, 4) seq;
insert into pgmcp.requests (id, session, rpc_id, method, name, body, context, stream, claimed_epoch, open,
                            finished_at) values
  (gen_random_uuid(), 1, null, 'notifications/cancelled', null, '', '', '{S1}', null, false, null),
  (gen_random_uuid(), 1, '7', 'tools/call', 'add', '', '', '{S1}', 3, true, null),
  (gen_random_uuid(), 1, '8', 'ping', null, '', '', '{S1}', null, true, null),
  (gen_random_uuid(), 1, '9', 'ping', null, '', '', '{S3}', 3, false, clock_timestamp());
insert into pgmcp.takeovers (session, session_id, from_node, to_node, epoch, reason) values
  (1, 'first', '{B}', '{A}', 2, 'lease'), (1, 'first', '{GONE}', '{A}', 3, 'silence');
"""


@pytest.fixture
async def filled(empty_database: str) -> str:
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
    connection = await asyncpg.connect(empty_database, timeout=10)
    await connection.execute(ROWS)
    await connection.close()
    return empty_database


def pick(rows: list[dict[str, object]], *columns: str) -> list[tuple[object, ...]]:
    return [tuple(row[column] for column in columns) for row in rows]


def test_nodes_that_are_dead_are_not_shown(filled: str) -> None:
    rows = views.fetch(filled, "pgmcp", "live_nodes")
    assert pick(rows, "node_id", "node_name", "state", "sessions", "streams") == [(A, "a", "ready", 1, 1)]
    remaining = rows[0]["lease_remaining"]
    assert isinstance(remaining, float)
    assert 0 < remaining < 10


def test_sessions_say_whose_they_are_and_what_they_do(filled: str) -> None:
    rows = views.fetch(filled, "pgmcp", "live_sessions")
    assert pick(rows, "session_id", "node_name", "epoch", "principal", "in_flight", "open_streams") == [
        ("first", "a", 3, "me@https://issuer via cli", 2, 1),
        ("second", "b", 1, None, 0, 0),
    ]


def test_requests_are_those_that_are_not_finished(filled: str) -> None:
    rows = views.fetch(filled, "pgmcp", "live_requests")
    assert pick(rows, "request_id", "method", "name", "node_name", "state") == [
        ("7", "tools/call", "add", "a", "running"),
        ("8", "ping", None, "a", "waiting"),
    ]
    assert all(isinstance(row["age"], float) for row in rows)


def test_streams_show_their_first_request_and_what_is_not_delivered(filled: str) -> None:
    rows = views.fetch(filled, "pgmcp", "live_streams")
    assert pick(rows, "kind", "request_id", "sink_node", "next_seq", "lag") == [
        ("request", "7", "a", 5, 2),
        ("standalone", None, None, 1, 0),
    ]


def test_takeovers_name_nodes_as_long_as_they_are_known(filled: str) -> None:
    rows = views.fetch(filled, "pgmcp", "takeover_history")
    assert pick(rows, "from_node", "to_node", "epoch", "reason") == [("b", "a", 2, "lease"), (GONE, "a", 3, "silence")]


def test_every_value_is_json_and_every_column_is_there(filled: str) -> None:
    for view, columns in COLUMNS.items():
        rows = views.fetch(filled, "pgmcp", view)
        assert rows
        assert tuple(rows[0]) == columns
        assert json.loads(json.dumps(rows)) == rows
        assert len(views.fetch(filled, "pgmcp", view, most=1)) == 1


def test_refusals_say_what_to_do(filled: str) -> None:
    with pytest.raises(SettingsError, match="There are: live_nodes"):
        views.fetch(filled, "pgmcp", "nodes; drop table x")
    with pytest.raises(SettingsError, match="Schema name"):
        views.fetch(filled, 'x"', "live_nodes")
    with pytest.raises(SchemaError, match="Run `pgmcp db upgrade`"):
        views.fetch(filled, "elsewhere", "live_nodes")
    with pytest.raises(DatabaseUnavailable, match="Check that it runs"):
        views.fetch("postgresql://me@127.0.0.1:1/db", "pgmcp", "live_nodes")


async def test_a_session_is_found_by_its_id_and_by_what_logs_call_it(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_sse = f"node-1-{'5e' * 16}"
    connection = await asyncpg.connect(filled, timeout=10)
    await connection.execute("update pgmcp.sessions set session_id = $1 where session_id = 'second'", of_sse)
    await connection.execute("delete from pgmcp.requests where rpc_id = '8'")
    await connection.close()
    monkeypatch.setenv("PGMCP_DATABASE_URL", filled)

    async def show(*called: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, main, ["sessions", "show", *called])

    alias = session_alias("first")
    found = [json.loads((await show(called, "--json")).output) for called in ("first", alias)]
    assert found[0].keys() == {"live_sessions", "live_requests", "live_streams", "takeover_history"}
    assert pick(found[1]["live_requests"], "session_id", "request_id") == [("first", "7")]
    assert pick(found[1]["takeover_history"], "to_node") == [("a",), ("a",)]
    assert found[0]["live_sessions"] == found[1]["live_sessions"]
    text = (await show(session_alias(of_sse))).output
    assert "live_sessions:" in text
    assert session_alias(of_sse) in text
    assert of_sse not in text, "views show it by the same alias"
    unknown = await show("nobody")
    assert unknown.exit_code == 1
    assert "No session of schema pgmcp has the id or alias nobody" in unknown.output
    listed = await asyncio.to_thread(CliRunner().invoke, main, ["sessions", "--json"])
    assert len(json.loads(listed.output)) == 2, "without `show` it lists all, as ever"
