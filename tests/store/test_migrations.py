"""The migrations build what the metadata says, alone in their schema, however often and by however many at once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
import pytest
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from pgmcp.errors import DatabaseUnavailable, SchemaError, SettingsError
from pgmcp.store.schema import alembic_run, migrations, public_views, revisions
from pgmcp.store.schema.revisions import OLDEST
from pgmcp.store.schema.tables import metadata
from tests.harness.waiting import wait_until

OBJECTS = """
select n.nspname, c.relname, c.relkind::text
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
union all
select n.nspname, p.proname, 'function' from pg_proc p join pg_namespace n on n.oid = p.pronamespace
 where n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
union all
select nspname, '', 'schema' from pg_namespace where nspname !~ '^pg_'
 order by 1, 2, 3
"""
COLUMNS = """
select c.relname, row_number() over (partition by c.oid order by a.attnum), a.attname,
       format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text, pg_get_expr(d.adbin, d.adrelid)
  from pg_class c
  join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
  left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
 where c.relnamespace = $1::regnamespace and c.relkind = 'r' and c.relname <> 'alembic_version' order by 1, 2
"""
CONSTRAINTS = """
select conrelid::regclass::text, conname, pg_get_constraintdef(oid)
  from pg_constraint where connamespace = $1::regnamespace and contype <> 'n' and conname <> 'alembic_version_pkc'
 order by 1, 2
"""
INDEXES = """
select tablename, indexname, indexdef from pg_indexes
 where schemaname = $1 and tablename <> 'alembic_version' order by 1, 2
"""
STORAGE = """
select relname, relpersistence::text, reloptions from pg_class
 where relnamespace = $1::regnamespace and relkind = 'r' and relname <> 'alembic_version' order by 1
"""
HOLD = """
create function public.hold() returns event_trigger language plpgsql as
$$ begin perform pg_advisory_xact_lock_shared(4711); end $$;
create event trigger hold on ddl_command_start when tag in ('CREATE VIEW') execute function public.hold();
"""
UNHOLD = "drop event trigger hold; drop function public.hold()"
IN_THE_MIDDLE = """select pid from pg_stat_activity
 where datname = current_database() and wait_event = 'advisory' and query like '%create view%'"""
ONE_UPGRADE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
from pgmcp.store.schema.migrations import upgrade
upgrade(sys.argv[1], 'pgmcp')
"""


def ask(dsn: str, sql: str, *args: object) -> list[tuple[object, ...]]:
    async def run() -> list[tuple[object, ...]]:
        connection = await asyncpg.connect(dsn, timeout=10)
        try:
            if args or sql.lstrip().startswith("select"):
                return [tuple(row) for row in await connection.fetch(sql, *args, timeout=10)]
            await connection.execute(sql, timeout=10)
            return []
        finally:
            await connection.close()

    return asyncio.run(run())


def until(dsn: str, sql: str, *args: object) -> None:
    """Wait for the query to return a row."""
    wait_until(lambda: bool(ask(dsn, sql, *args)), 20, sql)


def catalog(dsn: str, schema: str) -> dict[str, list[list[str]]]:
    """What PostgreSQL holds in the schema, without the schema's name."""
    found = {"columns": COLUMNS, "constraints": CONSTRAINTS, "indexes": INDEXES, "storage": STORAGE}
    return {
        kind: [[str(value).replace(f"{schema}.", "") for value in row] for row in ask(dsn, sql, schema)]
        for kind, sql in found.items()
    }


@contextmanager
def held(dsn: str) -> Iterator[None]:
    """Stop every migration that comes to the views: in the middle of 0001."""
    ask(dsn, HOLD)
    ready, release = threading.Event(), threading.Event()

    async def hold() -> None:
        connection = await asyncpg.connect(dsn, timeout=10)
        await connection.execute("select pg_advisory_lock(4711)")
        ready.set()
        await asyncio.to_thread(release.wait, 60)
        await connection.close()

    thread = threading.Thread(target=lambda: asyncio.run(hold()))
    thread.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        release.set()
        thread.join()
    ask(dsn, UNHOLD)


def started(dsn: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", ONE_UPGRADE, dsn], stderr=subprocess.PIPE)


def test_migrations_build_exactly_what_the_metadata_says(empty_database: str) -> None:
    async def create() -> None:
        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=lambda: asyncpg.connect(empty_database, timeout=10),
            poolclass=NullPool,
        )
        async with engine.begin() as connection:
            placed = await connection.execution_options(schema_translate_map={None: "model"})
            await placed.run_sync(metadata.create_all)
        await engine.dispose()

    ask(empty_database, "create schema model")
    asyncio.run(create())
    migrations.upgrade(empty_database, "pgmcp")

    built, wanted = catalog(empty_database, "pgmcp"), catalog(empty_database, "model")
    for kind in wanted:
        assert built[kind] == wanted[kind]
    assert len(wanted["storage"]) == len(metadata.tables)
    assert {row[1] for row in built["storage"]} == {"p"}


def test_check_finds_nothing_in_a_fresh_schema_and_everything_that_was_changed(empty_database: str) -> None:
    migrations.upgrade(empty_database, "pgmcp")
    assert migrations.check(empty_database, "pgmcp") == []

    ask(empty_database, "alter table pgmcp.nodes add note text; drop index pgmcp.requests_stream_idx")
    ask(empty_database, "drop view pgmcp.live_streams; drop view pgmcp.takeover_history")
    ask(empty_database, "create view pgmcp.takeover_history as select session_id from pgmcp.takeovers")
    ask(empty_database, "drop function pgmcp.publish_tools_list_changed")
    found = "\n".join(migrations.check(empty_database, "pgmcp"))
    for part in (
        "note",
        "requests_stream_idx",
        "view live_streams is missing",
        "view takeover_history.reason is missing",
        "function publish_tools_list_changed() is missing",
    ):
        assert part in found


def test_up_down_up_leaves_nothing_behind(empty_database: str) -> None:
    before = ask(empty_database, OBJECTS)
    migrations.upgrade(empty_database, "pgmcp")
    full = ask(empty_database, OBJECTS)
    for target in ("base", f"-{len(migrations.history(empty_database, 'pgmcp'))}"):
        migrations.downgrade(empty_database, "pgmcp", target)
        assert ask(empty_database, OBJECTS) == before
        assert migrations.current(empty_database, "pgmcp") is None
        migrations.upgrade(empty_database, "pgmcp")
        assert ask(empty_database, OBJECTS) == full
    migrations.upgrade(empty_database, "pgmcp")
    assert migrations.current(empty_database, "pgmcp") == revisions.head()
    assert {each.applied for each in migrations.history(empty_database, "pgmcp")} == {True}


def test_the_offline_scripts_do_the_same(empty_database: str) -> None:
    before = ask(empty_database, OBJECTS)
    migrations.upgrade(empty_database, "pgmcp")
    full, built = ask(empty_database, OBJECTS), catalog(empty_database, "pgmcp")
    ask(empty_database, migrations.sql("pgmcp", f"{revisions.head()}:base", down=True))
    assert ask(empty_database, OBJECTS) == before
    ask(empty_database, migrations.sql("pgmcp"))
    assert ask(empty_database, OBJECTS) == full
    assert catalog(empty_database, "pgmcp") == built
    assert migrations.check(empty_database, "pgmcp") == []


def test_a_schema_that_was_there_before_or_holds_other_objects_stays(empty_database: str) -> None:
    ask(empty_database, "create schema theirs")
    migrations.upgrade(empty_database, "theirs")
    migrations.downgrade(empty_database, "theirs", "base")
    assert [row for row in ask(empty_database, OBJECTS) if row[0] == "theirs"] == [("theirs", "", "schema")]

    migrations.upgrade(empty_database, "ours")
    ask(empty_database, "create table ours.notes (text text)")
    migrations.downgrade(empty_database, "ours", "base")
    assert [row for row in ask(empty_database, OBJECTS) if row[0] == "ours"] == [
        ("ours", "", "schema"),
        ("ours", "notes", "r"),
    ]


def test_two_schemas_of_one_database_do_not_see_each_other(empty_database: str) -> None:
    migrations.upgrade(empty_database, "one")
    migrations.upgrade(empty_database, "user")  # a reserved word of SQL
    assert catalog(empty_database, "one")["columns"] == catalog(empty_database, "user")["columns"]
    ask(empty_database, "alter table one.nodes add note text")
    assert migrations.check(empty_database, "user") == []
    migrations.downgrade(empty_database, "one", "base")
    assert migrations.current(empty_database, "user") == revisions.head()
    assert migrations.check(empty_database, "user") == []


def test_other_applications_and_other_alembic_users_are_left_alone(empty_database: str) -> None:
    ask(
        empty_database,
        "create table public.alembic_version (version_num varchar(32) primary key);"
        "insert into public.alembic_version values ('f00d');"
        "create table public.sessions (id text); create table public.nodes (id text);"
        "create view public.live_nodes as select * from public.nodes;"
        "create schema app; create table app.requests (id text)",
    )
    name = empty_database.rpartition("/")[2]
    ask(empty_database, f'alter database "{name}" set search_path = app, pgmcp, public')
    before = ask(empty_database, OBJECTS)

    migrations.upgrade(empty_database, "pgmcp")
    assert migrations.check(empty_database, "pgmcp") == []
    assert [row for row in ask(empty_database, OBJECTS) if row[0] != "pgmcp"] == before
    migrations.downgrade(empty_database, "pgmcp", "base")
    assert ask(empty_database, OBJECTS) == before
    assert ask(empty_database, "select version_num from public.alembic_version") == [("f00d",)]


def test_eight_processes_upgrade_an_empty_database_at_once(empty_database: str) -> None:
    running = [started(empty_database) for _ in range(8)]
    outcomes = [(process.communicate(timeout=100)[1], process.returncode) for process in running]
    assert outcomes == [(b"", 0)] * 8
    assert migrations.check(empty_database, "pgmcp") == []


def test_threads_of_one_process_upgrade_at_once(empty_database: str) -> None:
    failures: list[Exception] = []

    def run(schema: str) -> None:
        try:
            migrations.upgrade(empty_database, schema)
        except Exception as error:  # noqa: BLE001 - reported below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(f"s{number % 3}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert [migrations.check(empty_database, f"s{number}") for number in range(3)] == [[], [], []]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_cut_off_leaves_nothing_and_can_be_repeated(empty_database: str, how: signal.Signals) -> None:
    with held(empty_database):
        process = started(empty_database)
        until(empty_database, IN_THE_MIDDLE)
        process.send_signal(how)
        process.communicate(timeout=30)
        assert process.returncode != 0
        # The backend of a killed process notices only when its wait ends.
        ask(empty_database, f"select pg_terminate_backend(pid) from ({IN_THE_MIDDLE}) waiting")
    assert migrations.current(empty_database, "pgmcp") is None
    assert [row for row in ask(empty_database, OBJECTS) if row[0] == "pgmcp" and row[1] == "nodes"] == []

    migrations.upgrade(empty_database, "pgmcp")
    assert migrations.check(empty_database, "pgmcp") == []
    migrations.downgrade(empty_database, "pgmcp", "base")
    assert "pgmcp" not in {row[0] for row in ask(empty_database, OBJECTS)}


def test_down_cleans_up_after_a_run_that_only_made_the_schema(empty_database: str) -> None:
    before = ask(empty_database, OBJECTS)
    migrations.upgrade(empty_database, "pgmcp")
    migrations.downgrade(empty_database, "pgmcp", "base")
    ask(empty_database, migrations.sql("pgmcp").partition("BEGIN")[0])
    assert ask(empty_database, OBJECTS) != before
    migrations.downgrade(empty_database, "pgmcp", "base")
    assert ask(empty_database, OBJECTS) == before


def test_a_table_that_stays_locked_is_tried_again_and_then_named(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alembic_run, "TABLE_LOCK_SECONDS", 0.1)
    monkeypatch.setattr(alembic_run, "PAUSE_SECONDS", 0.01)
    with held(empty_database), pytest.raises(SchemaError, match=r"end it .* and run again"):
        migrations.upgrade(empty_database, "pgmcp")
    monkeypatch.setattr(alembic_run, "TRIES", 1000)
    with held(empty_database):
        thread = threading.Thread(target=migrations.upgrade, args=(empty_database, "pgmcp"), daemon=True)
        thread.start()
        until(empty_database, IN_THE_MIDDLE)
        ask(empty_database, "select pg_terminate_backend(pid) from pg_locks where objid = 4711 and granted")
        thread.join(30)
        assert not thread.is_alive()
    assert migrations.check(empty_database, "pgmcp") == []


async def test_the_lock_bounds_its_wait_and_does_not_block_concurrent_indexes(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alembic_run, "LOCK_WAIT_SECONDS", 0.2)
    other = await asyncpg.connect(empty_database, timeout=10)
    await other.execute("create table public.big (id int)")
    inside, over = threading.Event(), threading.Event()

    def work(_: object) -> None:
        inside.set()
        over.wait(60)

    migrating = asyncio.create_task(asyncio.to_thread(asyncio.run, alembic_run.guarded(empty_database, "pgmcp", work)))
    try:
        assert await asyncio.to_thread(inside.wait, 10)
        await other.execute("create index concurrently on public.big (id)", timeout=10)
        with pytest.raises(SchemaError, match="Somebody else has been migrating schema pgmcp"):
            await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
        await asyncio.to_thread(migrations.upgrade, empty_database, "elsewhere")
    finally:
        over.set()
        await migrating
    await other.close()


async def test_a_node_is_told_what_to_run_when_it_does_not_understand_the_schema(empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database, timeout=10)
    with pytest.raises(SchemaError, match=r"no tables of pgmcp in schema pgmcp. Run `pgmcp db upgrade`"):
        await revisions.understood(connection, "pgmcp")
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
    assert await revisions.understood(connection, "pgmcp") == revisions.head()

    await connection.execute("update pgmcp.alembic_version set version_num = '9999'")
    assert await revisions.understood(connection, "pgmcp") == "9999", "what was only expanded"
    await connection.execute("update pgmcp.schema_range set needs = '9998'")
    with pytest.raises(SchemaError, match=r"9999 and needs a build that knows 9998; .* Upgrade pgmcp"):
        await revisions.understood(connection, "pgmcp")
    await connection.execute("drop table pgmcp.schema_range")
    with pytest.raises(SchemaError, match=r"9999, which this build .* does not know. Upgrade pgmcp"):
        await revisions.understood(connection, "pgmcp")
    for move in (migrations.upgrade, migrations.downgrade):
        with pytest.raises(SchemaError, match="Upgrade pgmcp"):
            await asyncio.to_thread(move, empty_database, "pgmcp", "base" if move is migrations.downgrade else "head")
    with pytest.raises(SchemaError, match="Upgrade pgmcp"):
        await asyncio.to_thread(migrations.check, empty_database, "pgmcp")

    await connection.execute("delete from pgmcp.alembic_version")
    with pytest.raises(SchemaError, match="Run `pgmcp db upgrade`"):
        await revisions.understood(connection, "pgmcp")
    await connection.close()


async def test_a_database_that_is_behind_is_told_from_one_that_is_ahead(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp", "0002")
    connection = await asyncpg.connect(empty_database, timeout=10)
    with pytest.raises(SchemaError, match=rf"at revision 0002, this build needs {OLDEST}. Run `pgmcp db upgrade`"):
        await revisions.understood(connection, "pgmcp")
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
    monkeypatch.setattr(migrations, "head", lambda: "9999")
    assert await revisions.understood(connection, "pgmcp") == alembic_run.scripts().get_current_head()
    with pytest.raises(SchemaError, match=r"not at 9999. Run `pgmcp db upgrade`"):
        await asyncio.to_thread(migrations.check, empty_database, "pgmcp")
    await connection.close()


def test_refusals_name_the_place_and_the_next_step_but_no_password(empty_database: str) -> None:
    with pytest.raises(DatabaseUnavailable, match=r"127\.0\.0\.1:1/db") as away:
        migrations.upgrade("postgresql://me:hidden@127.0.0.1:1/db", "pgmcp")
    assert "hidden" not in str(away.value)
    for url in ("", "postgresql://me:hid/den@host/db", "mysql://me:hidden@host/db"):
        with pytest.raises(SettingsError, match="postgresql://user:password") as malformed:
            migrations.current(url, "pgmcp")
        assert "hid" not in str(malformed.value)
    for schema in ('x"; drop', "", "Upper", "pg_mine", "a" * 42):
        with pytest.raises(SettingsError, match="Schema name"):
            migrations.upgrade(empty_database, schema)
    with pytest.raises(SchemaError, match="db history"):
        migrations.upgrade(empty_database, "pgmcp", "0099")
    with pytest.raises(SchemaError, match="db history"):
        migrations.sql("pgmcp", "0099")


def test_a_read_only_database_is_refused_with_the_reason(empty_database: str) -> None:
    name = empty_database.rpartition("/")[2]
    ask(empty_database, f'alter database "{name}" set default_transaction_read_only = on')
    with pytest.raises(SchemaError, match="connect to the primary"):
        migrations.upgrade(empty_database, "pgmcp")


def test_a_role_with_a_schema_of_its_own_needs_no_other_right(empty_database: str) -> None:
    server, _, name = empty_database.rpartition("/")
    role = f"role_of_{name}"
    dsn = f"postgresql://{role}:secret@{server.rpartition('@')[2]}/{name}"
    ask(empty_database, f"create role \"{role}\" login password 'secret'")
    try:
        with pytest.raises(SchemaError, match="grant this one CREATE on the database"):
            migrations.upgrade(dsn, "pgmcp")
        ask(empty_database, f'create schema pgmcp authorization "{role}"')
        migrations.upgrade(dsn, "pgmcp")
        assert migrations.check(dsn, "pgmcp") == []
        migrations.downgrade(dsn, "pgmcp", "base")
        assert [row for row in ask(empty_database, OBJECTS) if row[0] == "pgmcp"] == [("pgmcp", "", "schema")]
    finally:
        ask(empty_database, f'drop owned by "{role}"; drop role "{role}"')


def test_something_of_the_user_that_depends_on_a_view_stops_the_way_down(empty_database: str) -> None:
    migrations.upgrade(empty_database, "pgmcp")
    ask(empty_database, "create view public.mine as select node_name from pgmcp.live_nodes")
    with pytest.raises(SchemaError, match="drop that first"):
        migrations.downgrade(empty_database, "pgmcp", "base")
    assert migrations.current(empty_database, "pgmcp") == "0001", "each migration is a step of its own"
    migrations.upgrade(empty_database, "pgmcp")
    assert migrations.check(empty_database, "pgmcp") == []


def test_the_public_views_have_the_public_columns_in_order(empty_database: str) -> None:
    migrations.upgrade(empty_database, "pgmcp")
    found = ask(
        empty_database,
        "select c.relname::text, array_agg(a.attname::text order by a.attnum) from pg_class c "
        "join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 "
        "where c.relkind = 'v' and c.relnamespace = $1::regnamespace group by 1",
        "pgmcp",
    )
    assert {name: tuple(columns) for name, columns in found} == public_views.COLUMNS  # type: ignore[arg-type]
