"""``pgmcp db``: what it prints, and how it refuses."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest
from click.testing import CliRunner, Result

from pgmcp.cli.db import db
from pgmcp.errors import DatabaseUnavailable, SchemaError


def run(*arguments: str, dsn: str = "") -> Result:
    return CliRunner().invoke(db, arguments, env={"PGMCP_DATABASE_URL": dsn, "PGMCP_SCHEMA": "tests"})


def test_the_way_up_and_back_as_people_see_it(empty_database: str) -> None:
    steps = [
        (("current",), "none: schema tests has no tables of pgmcp. Run `pgmcp db upgrade`."),
        (("upgrade",), "Schema tests: base -> 0005."),
        (("upgrade", "head"), "Schema tests was already at 0005."),
        (("current",), "0005 (head)"),
        (("history",), "0005  applied  Expand: "),
        (("check",), "Schema tests is at revision 0005 and as this build expects."),
        (("downgrade", "0001"), "Schema tests: 0005 -> 0001."),
        (("downgrade", "base"), "Schema tests: 0001 -> base."),
        (("downgrade",), "Schema tests was already at base."),
        (("history",), "0005  missing  Expand: "),
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

    assert printed("current") == {"schema": "tests", "revision": None, "head": "0005"}
    assert printed("upgrade") == {"schema": "tests", "before": None, "revision": "0005"}
    assert printed("check") == {"schema": "tests", "head": "0005", "differences": []}
    history = printed("history")
    assert isinstance(history, list)
    assert (history[0]["revision"], history[0]["applied"]) == ("0005", True)
    script = printed("sql")
    assert isinstance(script, dict)
    assert 'create schema "tests"' in script["sql"]
    assert printed("downgrade", "base") == {"schema": "tests", "before": "0005", "revision": None}


def test_refusals_are_errors_of_pgmcp_and_usage_is_2(empty_database: str) -> None:
    assert run("current").exit_code == 2
    assert run("nothing", dsn=empty_database).exit_code == 2
    assert isinstance(run("check", dsn=empty_database).exception, SchemaError)
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
