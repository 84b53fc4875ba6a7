"""Every named statement fits the schema, shows its fence, and finds its rows by an index."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import pgmcp
from pgmcp.store.statements import names, statement
from tests.harness.stores import IDS, own_sql, store

PACKAGE = Path(pgmcp.__file__).parent
OF_A_SESSION = ("sessions", "streams", "events", "requests", "journal")
WRITES = re.compile(rf"\b(?:insert into|update|delete from) \{{schema\}}\.({'|'.join(OF_A_SESSION)})\b")
OF_AN_EDGE = {"attach", "release", "free_request_id"}
"""They write under no ownership: the newest sink, the sink's own epoch, and what is finished protect them."""

HOUSEKEEPING = re.compile(r"prune_\w+")
"""What is finished and delivered goes, whoever owns it."""

NEW = {"open_session"}
"""It creates the session, so that there is nothing to fence against."""

HOT = ("accept", "claim", "append", "read_streams", "attach", "release", "find_session", "unclaimed", "establish")
SOME = 3000


def code(name: str) -> str:
    """A statement without its comments, in lower case."""
    return re.sub(r"--[^\n]*", "", statement(name, "x")).lower().replace('"x"', "{schema}")


OF_AN_OWNER = [
    name
    for name in names()
    if WRITES.search(code(name)) and name not in OF_AN_EDGE | NEW and not HOUSEKEEPING.fullmatch(name)
]


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    made = await asyncpg.connect(database, timeout=10)
    yield made
    await made.close()


@pytest.mark.parametrize("name", names())
async def test_it_fits_the_schema(connection: asyncpg.Connection, name: str) -> None:
    await connection.prepare(statement(name, "pgmcp"))


def test_no_schema_is_written_out() -> None:
    """Every table is named through the schema that the settings give."""
    others = ("nodes", "node_states", "publications", "schema_range", "secrets", "spent_states", "takeovers")
    tables = "|".join((*OF_A_SESSION, *others))
    for name in names():
        found = re.findall(rf"\b(?:from|join|into|update)\s+(?:{tables})\b", code(name))
        assert not found, f"{name} names a table without its schema"


def test_the_owners_writes_are_found() -> None:
    """The control of the test below."""
    owned = {
        "append",
        "claim",
        "establish",
        "write_journal",
        "drop_sink",
        "expire_sessions",
        "drop_dead_sinks",
        "end_owned_session",
    }
    assert owned <= set(OF_AN_OWNER)


@pytest.mark.parametrize("name", OF_AN_OWNER)
def test_a_write_shows_its_fence(name: str) -> None:
    assert "-- fence:" in statement(name, "x"), f"{name} writes rows of a session: say what protects it"


@pytest.mark.parametrize("name", ["append", "claim", "establish", "write_journal", "drop_sink", "accept", "attach"])
def test_a_fence_is_a_lock(name: str) -> None:
    """A fence that only joins ``sessions`` leaks; and a lock without a limit holds up a whole group."""
    assert re.search(r"for key share of s\b", code(name))
    assert "set_config('lock_timeout', '250ms', true)" in code(name)


@pytest.mark.parametrize("name", ["append", "claim", "accept"])
def test_a_group_locks_sessions_in_the_order_of_their_ids(name: str) -> None:
    assert re.search(r"order by s\.id\s+for key share of s\b", code(name))


def python_strings() -> Iterator[tuple[str, str]]:
    """Every string of the package's code that is no docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        loose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in loose:
                yield str(path.relative_to(PACKAGE)), node.value


def sql_texts() -> Iterator[tuple[str, str]]:
    """Everything that is sent to PostgreSQL, as far as it is SQL."""
    for name in names():
        yield name, code(name)
    for path, text in python_strings():
        if path.startswith("store/"):
            yield path, text.lower()


def test_no_sql_outside_the_store() -> None:
    sql = re.compile(r"(?is)\bselect\b.+\bfrom\b|\binsert\s+into\b|\bupdate\s+\S+\s+set\b|\bdelete\s+from\b")
    found = [(path, text) for path, text in python_strings() if sql.search(text) and not path.startswith("store/")]
    assert found == []


LASTING = re.compile(
    r"pg_(try_)?advisory_(lock|unlock)"
    r"|(^|;)\s*set\s+(?!local\b)\w+"
    r"|set_config\((?:[^()]|\([^()]*\))*,\s*false\s*\)"
)
"""What stays with a connection when its transaction is over."""


def test_no_lock_and_no_setting_outlives_its_transaction() -> None:
    """Migrations run on a connection of their own, which ends with them; no pool and no pooler sees their settings.

    What ``pin`` sets belongs to a connection for its whole life, and no pooler stands before it.
    """
    texts = [(where, text) for where, text in sql_texts() if where not in {"store/schema/alembic_run.py", "pin"}]
    assert [(where, found[0]) for where, text in texts if (found := LASTING.search(text))] == []


def test_migrations_take_no_lasting_lock() -> None:
    texts = [text for where, text in sql_texts() if where == "store/schema/alembic_run.py"]
    assert not any(re.search(r"advisory_(lock|unlock)|pg_try_advisory_lock", text) for text in texts)


@pytest.mark.parametrize(
    ("text", "lasts"),
    [
        ("select pg_advisory_xact_lock(1)", False),
        ("select pg_try_advisory_lock(1)", True),
        ("set local lock_timeout = 1", False),
        ("select 1; set lock_timeout = 1", True),
        ("select set_config('lock_timeout', '250ms', true)", False),
        ("select set_config('lock_timeout', '250ms', false)", True),
        ("update x set y = 1", False),
    ],
)
def test_the_search_for_what_lasts_finds_it(text: str, lasts: bool) -> None:
    assert bool(LASTING.search(text)) == lasts


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes_of(child)


def sample(kind: str) -> Any:
    """An argument of a type, as few as there are."""
    single = kind.removesuffix("[]")
    value: Any = {
        "uuid": IDS.uuid(), "int8": 1, "int4": 1, "text": "1", "bytea": b"x", "bool": False, "float8": 1.0,
        "timestamptz": None, "interval": None,
    }[single]  # fmt: skip
    return [value] if kind.endswith("[]") else value


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_hot_statements_use_their_indexes(connection: asyncpg.Connection, mode: str) -> None:
    """With 3,000 sessions, none of them reads a table from end to end."""
    await connection.execute(
        f"""
        insert into pgmcp.sessions (session_id, owner, transport)
            select 's' || n, gen_random_uuid(), 'streamable' from generate_series(1, {SOME}) n;
        insert into pgmcp.streams (id, session, kind) select gen_random_uuid(), id, 'request' from pgmcp.sessions;
        insert into pgmcp.streams (id, session, kind) select gen_random_uuid(), id, 'standalone' from pgmcp.sessions;
        insert into pgmcp.requests
            (id, session, rpc_id, body, context, stream, open, claimed_epoch, finished_at, outcome)
            select gen_random_uuid(), session, '1', '', '', id, true, 1, clock_timestamp(), 'answered'
            from pgmcp.streams where kind = 'request';
        insert into pgmcp.events (stream, seq, message)
            select id, n, '' from pgmcp.streams, generate_series(1, 3) n;
        analyze pgmcp.sessions, pgmcp.streams, pgmcp.requests, pgmcp.events;
        set plan_cache_mode = {mode};
        """
    )
    scans = []
    for name in HOT:
        text = statement(name, "pgmcp")
        prepared = await connection.prepare(text)
        kinds = [f"{kind.name}" for kind in prepared.get_parameters()]
        types = ", ".join(f"{kind[:-2]}[]" if kind.endswith("[]") else kind for kind in kinds)
        values = ", ".join(literal(kind, sample(kind)) for kind in kinds)
        await connection.execute(f"prepare hot_{name} ({types}) as {text}")
        plan = json.loads(await connection.fetchval(f"explain (format json) execute hot_{name} ({values})"))
        scans += [
            (name, node["Relation Name"])
            for node in nodes_of(plan[0]["Plan"])
            if node["Node Type"] == "Seq Scan" and node.get("Relation Name") in OF_A_SESSION
        ]
    assert scans == []


def literal(kind: str, value: Any) -> str:
    """A value as it stands in a text of SQL."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"array[{literal(kind[:-2], value[0])}]::{kind}"
    return f"'{value.decode() if isinstance(value, bytes) else value}'::{kind}"


async def test_no_statement_is_compiled(database: str) -> None:
    """Where a sequential scan is priced out of reach, PostgreSQL before 18 would compile what needs one, each time."""
    async with store(database) as node:
        with own_sql():
            [found] = await node.database.fetch("show jit")
            assert found["jit"] == "off"
            plan = await node.database.fetch(f"explain (analyze) {statement('history', 'pgmcp')}", None, None)
            assert not [row for row in plan if "JIT" in row[0]]


async def test_a_look_at_the_schema_takes_a_connection_that_is_there(database: str) -> None:
    """A node has no more connections than its pool may have, also when all of them are idle."""
    ours = "datname = current_database() and application_name like 'pgmcp%' and application_name not like '%line'"
    async with store(database, pool_size=3) as node:
        with own_sql():
            await asyncio.gather(*(node.database.fetch("select from pg_sleep(0.1)") for _ in range(3)))
            await node.database.revision()
            [found] = await node.database.fetch(f"select count(*) from pg_stat_activity where {ours}")
    assert found["count"] == 3
