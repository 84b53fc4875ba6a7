"""Builds side by side: nodes publish which schemas they fit, and a step that takes something away waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgmcp.errors import SchemaError, SchemaInUse
from pgmcp.store.nodes import join, outgrown
from pgmcp.store.schema import alembic_run, migrations, revisions
from pgmcp.store.schema.revisions import OLDEST
from pgmcp.store.statements import names, statement
from pgmcp.types import NodeRecord
from tests.harness.builds import newer, newer_migrations
from tests.harness.stores import IDS, Watcher, store

JOIN_OF_THE_BUILD_BEFORE_0003 = """
insert into pgmcp.nodes
    (node_id, name, address, state, expires_at, version, schema_revision, capacity)
values ($1, $2, $3, 'joining', clock_timestamp() + make_interval(secs => $4), $5, $6, $7)
on conflict (node_id) do nothing
"""
HAS_CAPABILITIES = """
select exists (
    select from information_schema.columns where table_schema = 'pgmcp' and column_name = 'client_capabilities'
)
"""
UNUSED = """
select count(*) from information_schema.columns
 where table_schema = 'pgmcp' and (table_name, column_name) in
       (('nodes', 'capacity'), ('sessions', 'state'), ('sessions', 'wanted_owner'), ('sessions', 'expires_at'))
"""
NEEDS = "select needs from pgmcp.schema_range"
NEEDED = max(getattr(script.module, "needs", "0001") for script in alembic_run.scripts().walk_revisions())
"""What the contract steps of this build make a build know."""
OVER_ALL = "select state, cause from pgmcp.nodes order by name"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The migrations of a newer build."""
    return newer_migrations(tmp_path / "migrations")


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    made = await asyncpg.connect(database, timeout=10)
    yield made
    await made.close()


async def node(connection: asyncpg.Connection, name: str = "n1", **values: Any) -> None:
    """The row of a node, of this build unless something else is said."""
    row = {
        "node_id": IDS.uuid(), "name": name, "address": "", "state": "ready", "version": "1",
        "schema_revision": revisions.head(), "schema_oldest": OLDEST, "schema_newest": revisions.head(),
    } | values  # fmt: skip
    away = row.pop("away", -10)
    marks = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    await connection.execute(
        f"insert into pgmcp.nodes ({', '.join(row)}, expires_at) "
        f"values ({marks}, clock_timestamp() - make_interval(secs => {away}))",
        *row.values(),
    )


async def migrate(folder: Path, database: str, *, down: str | None = None) -> None:
    """What the newer build's commands do."""
    with newer(folder):
        if down is None:
            await asyncio.to_thread(migrations.upgrade, database, "pgmcp")
        else:
            await asyncio.to_thread(migrations.downgrade, database, "pgmcp", down)


async def joined(database: str) -> None:
    """A node of the build that this process is of joins."""
    async with store(database) as joining:
        await join(joining.database, NodeRecord(joining.node, "joined", "", "1", "0003"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"state": "joining"},
        {"state": "draining"},
        {"away": 30},
        {"schema_revision": "0002", "schema_oldest": None, "schema_newest": None},
        {"schema_newest": "0899"},
    ],
    ids=str,
)
async def test_a_contract_step_waits_for_a_node_that_needs_what_it_removes(
    database: str, connection: asyncpg.Connection, folder: Path, values: dict[str, Any]
) -> None:
    await node(connection, **values)
    await node(connection, "fits", schema_newest="0900")
    with pytest.raises(SchemaInUse, match=r"step to 0901 waits .* n1 \([0-9a-f-]{36}\)\. The steps before it are done"):
        await migrate(folder, database)
    assert await connection.fetchval("select version_num from pgmcp.alembic_version") == "0900"
    assert await connection.fetchval(HAS_CAPABILITIES)
    assert await connection.fetchval(NEEDS) == NEEDED
    await connection.execute("update pgmcp.nodes set state = 'left' where name = 'n1'")
    await migrate(folder, database)
    assert await connection.fetchval("select version_num from pgmcp.alembic_version") == "0901"
    assert not await connection.fetchval(HAS_CAPABILITIES)
    assert await connection.fetchval(NEEDS) == "0900"


@pytest.mark.parametrize(
    "values",
    [{"state": "left"}, {"state": "dead"}, {"schema_newest": "0900"}, {"schema_newest": "0901"}],
    ids=str,
)
async def test_it_waits_for_nobody_else(
    database: str, connection: asyncpg.Connection, folder: Path, values: dict[str, Any]
) -> None:
    await node(connection, **values)
    await migrate(folder, database)
    assert await connection.fetchval("select version_num from pgmcp.alembic_version") == "0901"


async def test_who_was_away_for_a_minute_is_dead_to_a_shape_that_it_does_not_fit(
    database: str, connection: asyncpg.Connection, folder: Path
) -> None:
    await node(connection, "a", away=61)
    await node(connection, "b", away=61, schema_newest="0900")
    await migrate(folder, database)
    assert [tuple(row) for row in await connection.fetch(OVER_ALL)] == [("dead", "schema"), ("ready", None)]


async def test_nodes_of_an_older_build_start_anew_on_what_was_only_expanded(
    database: str, connection: asyncpg.Connection, folder: Path
) -> None:
    await node(connection)
    with pytest.raises(SchemaInUse):
        await migrate(folder, database)
    assert await revisions.understood(connection, "pgmcp") == "0900"
    await joined(database)
    [found] = await connection.fetch("select * from pgmcp.nodes where name = 'joined'")
    assert (found["schema_oldest"], found["schema_newest"]) == (OLDEST, revisions.head())
    await asyncio.to_thread(migrations.upgrade, database, "pgmcp")  # as the older build's own job does
    assert await asyncio.to_thread(migrations.current, database, "pgmcp") == "0900"
    with pytest.raises(SchemaError, match="0900, which this build"):
        await asyncio.to_thread(migrations.check, database, "pgmcp")
    with pytest.raises(SchemaError, match="0900, which this build"):
        await asyncio.to_thread(migrations.downgrade, database, "pgmcp", "-1")
    async with store(database) as older:
        assert not await outgrown(older.database)


async def test_after_a_contract_step_an_older_build_is_refused_and_a_running_node_learns_of_it(
    database: str, connection: asyncpg.Connection, folder: Path
) -> None:
    await migrate(folder, database)
    refused = "needs a build that knows 0900; this one's newest is"
    with pytest.raises(SchemaError, match=refused):
        await revisions.understood(connection, "pgmcp")
    with pytest.raises(SchemaError, match=refused):
        await asyncio.to_thread(migrations.upgrade, database, "pgmcp")
    with pytest.raises(SchemaError, match="Upgrade pgmcp"):
        await joined(database)
    assert await connection.fetchval("select count(*) from pgmcp.nodes") == 0
    async with store(database) as older:
        assert await outgrown(older.database)
        with newer(folder):
            assert not await outgrown(older.database)
            assert await revisions.understood(connection, "pgmcp") == "0901"


async def test_a_node_of_the_build_before_the_ranges_joins_as_ever(empty_database: str, folder: Path) -> None:
    """While its columns are there: what this build does without goes when no such node lives."""
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp", OLDEST)
    connection = await asyncpg.connect(empty_database, timeout=10)
    await connection.execute(JOIN_OF_THE_BUILD_BEFORE_0003, IDS.uuid(), "old", "", 10.0, "0.1", "0002", 1)
    await joined(empty_database)
    with pytest.raises(SchemaInUse, match=r"step to 0021 waits .* old \("):
        await migrate(folder, empty_database)
    assert await connection.fetchval(UNUSED) == 4
    await connection.execute("update pgmcp.nodes set state = 'left' where name = 'old'")
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
    assert await connection.fetchval(UNUSED) == 0
    assert await connection.fetchval(NEEDS) == NEEDED
    await connection.close()


async def test_who_joins_during_a_contract_step_is_judged_by_what_it_leaves(
    database: str, connection: asyncpg.Connection
) -> None:
    step = await asyncpg.connect(database, timeout=10)
    change = step.transaction()
    await change.start()
    await step.execute("update pgmcp.schema_range set needs = '0900'")
    joining = asyncio.create_task(joined(database))
    assert await Watcher(connection).until_waiting("/* join */", joining)
    await change.commit()
    with pytest.raises(SchemaError, match="Upgrade pgmcp"):
        await joining
    await step.close()


async def test_a_contract_step_sees_who_joins_right_before_it(
    database: str, connection: asyncpg.Connection, folder: Path
) -> None:
    with newer(folder):
        await asyncio.to_thread(migrations.upgrade, database, "pgmcp", "0900")
    joining = await asyncpg.connect(database, timeout=10)
    change = joining.transaction()
    await change.start()
    await joining.fetch(
        statement("join", "pgmcp"), IDS.uuid(), "late", "", 10.0, "1", "0003", OLDEST, revisions.head(), ""
    )
    stepping = asyncio.create_task(migrate(folder, database))
    assert await Watcher(connection).until_waiting("schema_range", stepping)
    await change.commit()
    with pytest.raises(SchemaInUse, match=r"late \("):
        await stepping
    await joining.close()


async def test_a_step_back_waits_for_nodes_too(database: str, connection: asyncpg.Connection, folder: Path) -> None:
    await migrate(folder, database)
    with newer(folder):
        await node(connection, schema_oldest="0900")
    with pytest.raises(SchemaInUse, match=rf"step to {revisions.head()} waits .* n1 \("):
        await migrate(folder, database, down=revisions.head())
    assert await asyncio.to_thread(migrations.current, database, "pgmcp") == "0900"
    assert await connection.fetchval(NEEDS) == NEEDED
    await connection.execute("update pgmcp.nodes set state = 'left'")
    await migrate(folder, database, down="base")
    assert await asyncio.to_thread(migrations.current, database, "pgmcp") is None


async def test_the_scripts_for_psql_wait_as_well(database: str, connection: asyncpg.Connection, folder: Path) -> None:
    await node(connection)
    with newer(folder):
        script = migrations.sql("pgmcp", f"{alembic_run.scripts().get_revision('0900').down_revision}:head")
    with pytest.raises(asyncpg.PostgresError, match=r"step to 0901 waits .* n1 \("):
        await connection.execute(script)
    await connection.execute("rollback")
    assert await connection.fetchval("select version_num from pgmcp.alembic_version") == "0900"


async def test_a_long_reader_keeps_a_migration_waiting_and_nobody_else(
    database: str, connection: asyncpg.Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alembic_run, "TABLE_LOCK_SECONDS", 0.3)
    monkeypatch.setattr(alembic_run, "PAUSE_SECONDS", 0.3)
    monkeypatch.setattr(alembic_run, "TRIES", 1000)
    await node(connection, schema_newest="0900")
    reader = await asyncpg.connect(database, timeout=10)
    async with reader.transaction():
        await reader.fetch("select * from pgmcp.sessions")
        stepping = asyncio.create_task(migrate(folder, database))
        for _ in range(3):
            assert await Watcher(connection).until_waiting("ALTER TABLE pgmcp.sessions", stepping)
            await connection.execute("update pgmcp.sessions set last_active_at = clock_timestamp()", timeout=5)
        assert not stepping.done()
    await stepping
    await reader.close()
    assert await asyncio.to_thread(migrations.current, database, "pgmcp") == "0901"


async def test_every_statement_fits_the_oldest_schema_of_the_range(empty_database: str) -> None:
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp", OLDEST)
    connection = await asyncpg.connect(empty_database, timeout=10)
    for name in names():
        await connection.prepare(statement(name, "pgmcp"))
    await connection.close()


def test_each_migration_says_what_it_is() -> None:
    needs = "0001"
    for script in reversed(list(alembic_run.scripts().walk_revisions())):
        number, kind, _ = Path(script.path).name.split("_", 2)
        assert number == script.revision
        assert len(number) == 4
        former = script.down_revision or "0000"
        assert isinstance(former, str)
        assert former < number, "builds and databases are compared by these numbers"
        assert script.doc.lower().startswith(f"{kind}: ")
        assert kind in {"expand", "contract"}
        assert (kind == "contract") == hasattr(script.module, "needs"), "only what takes something away says `needs`"
        before, needs = needs, getattr(script.module, "needs", needs)
        assert before <= needs <= script.revision
    assert revisions.head() >= OLDEST
