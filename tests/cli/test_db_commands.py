"""``pgmcp db``: what it prints, and how it refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import asyncpg
import pytest
from click.testing import CliRunner, Result

from pgmcp.cli import main
from pgmcp.cli.db import db
from pgmcp.errors import DatabaseUnavailable, SchemaError, SettingsError
from pgmcp.store.schema.revisions import head
from tests.harness.builds import newer, newer_migrations

HEAD = head()


def run(*arguments: str, dsn: str = "") -> Result:
    return CliRunner().invoke(db, arguments, env={"PGMCP_DATABASE_URL": dsn, "PGMCP_SCHEMA": "tests"})


def test_the_way_up_and_back_as_people_see_it(empty_database: str) -> None:
    steps = [
        (("current",), "none: schema tests has no tables of pgmcp. Run `pgmcp db upgrade`."),
        (("upgrade",), f"Schema tests: base -> {HEAD}."),
        (("upgrade", "head"), f"Schema tests was already at {HEAD}."),
        (("current",), f"{HEAD} (head)"),
        (("history",), f"{HEAD}  applied  Contract: "),
        (("check",), f"Schema tests is at revision {HEAD} and as this build expects."),
        (("downgrade", "0002"), f"Schema tests: {HEAD} -> 0002."),
        (("downgrade", "-1"), "Schema tests: 0002 -> 0001."),
        (("downgrade", "base"), "Schema tests: 0001 -> base."),
        (("downgrade",), "Schema tests was already at base."),
        (("history",), f"{HEAD}  missing  Contract: "),
    ]
    for arguments, wanted in steps:
        result = run(*arguments, dsn=empty_database)
        assert (result.exit_code, result.exception) == (0, None), arguments
        assert wanted in result.stdout


def test_every_command_prints_json(empty_database: str) -> None:
    def printed(*arguments: str) -> object:
        result = run(*arguments, "--json", dsn=empty_database)
        assert result.exit_code == 0
        return json.loads(result.stdout)

    assert printed("current") == {"schema": "tests", "revision": None, "head": HEAD}
    assert printed("upgrade") == {"schema": "tests", "before": None, "revision": HEAD}
    assert printed("check") == {"schema": "tests", "head": HEAD, "differences": []}
    history = printed("history")
    assert isinstance(history, list)
    assert (history[0]["revision"], history[0]["applied"]) == (HEAD, True)
    script = printed("sql")
    assert isinstance(script, dict)
    assert 'create schema "tests"' in script["sql"]
    assert printed("downgrade", "base") == {"schema": "tests", "before": HEAD, "revision": None}
    granted = printed("grants", "--runtime", "nodes")
    assert isinstance(granted, dict)
    assert 'on all tables in schema "tests" to "nodes"' in granted["sql"]


def test_refusals_are_errors_of_pgmcp_and_usage_is_2(empty_database: str) -> None:
    assert run("current").exit_code == 2
    assert run("nothing", dsn=empty_database).exit_code == 2
    assert isinstance(run("check", dsn=empty_database).exception, SchemaError)
    for roles in (("a", "--reader", "a"), ("a", "--owner", "a"), ("$$",), ("a\nb",), ("a" * 64,)):
        assert isinstance(run("grants", "--runtime", *roles).exception, SettingsError), roles
    assert run("grants").exit_code == 2
    assert isinstance(run("current", dsn="postgresql://me@127.0.0.1:1/db").exception, DatabaseUnavailable)


def test_check_shows_what_was_changed(empty_database: str) -> None:
    run("upgrade", dsn=empty_database)
    assert run("sql", "--down", "0001:base", dsn="").stdout.count("DROP TABLE") == 8

    async def drop() -> None:
        connection = await asyncpg.connect(empty_database, timeout=10)
        await connection.execute("drop view tests.live_streams")
        await connection.close()

    asyncio.run(drop())
    result = run("check", "--json", dsn=empty_database)
    assert json.loads(result.stdout)["differences"] == ["view live_streams is missing"]
    with pytest.raises(SchemaError, match="live_streams is missing"):
        raise result.exception or AssertionError


def test_a_contract_step_that_waits_has_an_exit_code_of_its_own_or_is_left_for_later(
    database: str, tmp_path: Path
) -> None:
    async def start_node() -> None:
        connection = await asyncpg.connect(database, timeout=10)
        await connection.execute(
            "insert into pgmcp.nodes (node_id, name, address, state, expires_at, version, schema_revision) "
            "values (gen_random_uuid(), 'n1', '', 'ready', now() + interval '1 minute', '1', '0002')"
        )
        await connection.close()

    def upgrade(*options: str) -> Result:
        return CliRunner().invoke(main, ["db", "upgrade", *options], env={"PGMCP_DATABASE_URL": database})

    asyncio.run(start_node())
    with newer(newer_migrations(tmp_path / "migrations")):
        refused = upgrade()
        assert refused.exit_code == 5
        assert refused.stdout == f"Schema pgmcp: {HEAD} -> 0900.\n"
        assert "The step to 0901 waits for living nodes that could not go on after it: n1 (" in refused.stderr
        assert "`pgmcp drain NODE`" in refused.stderr
        later = upgrade("--contract-later")
        assert later.exit_code == 0
        assert later.stdout.startswith("Schema pgmcp was already at 0900.\nThe step to 0901 waits ")
        printed = json.loads(upgrade("--contract-later", "--json").stdout)
        assert (printed["revision"], printed["waits"][:16]) == ("0900", "The step to 0901")
