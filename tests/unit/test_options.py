"""Options on their way to another pgmcp process."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from pgmcp.cli import main
from pgmcp.cli.options import GROUPS, arguments, load, settings_options


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({"access_log": True}, ["--access-log"]),
        ({"access_log": False}, ["--no-access-log"]),
        ({"allowed_hosts": ("a", "b"), "port": 1}, ["--allowed-hosts", "a,b", "--port", "1"]),
        ({"max_age": 2592000.0}, ["--max-age", "2592000.0"]),
        ({"poll": 0.00001}, ["--poll", "0.00001"]),
        ({"database_url": "postgresql://user:secret@host/db"}, []),
    ],
)
def test_what_was_given_is_passed_on_as_it_can_be_read_again(given: dict[str, Any], passed: list[str]) -> None:
    assert arguments(given) == passed
    found: dict[str, Any] = {}

    @settings_options()
    def read(given: dict[str, Any]) -> None:
        found.update(given)

    assert CliRunner().invoke(click.command()(read), passed).exit_code == 0
    assert found == {name: value for name, value in given.items() if name != "database_url"}


def test_no_option_goes_before_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGMCP_ACCESS_LOG", "true")
    assert load({}).access_log
    assert not load({"access_log": False}).access_log


def test_options_take_durations_and_say_so() -> None:
    found: dict[str, Any] = {}

    @settings_options(only=("max_age", "hold"))
    def read(given: dict[str, Any]) -> None:
        found.update(given)

    command = click.command()(read)
    assert CliRunner().invoke(command, ["--max-age", "30d", "--hold", "250ms"]).exit_code == 0
    assert found == {"max_age": 2592000.0, "hold": 0.25}
    refused = CliRunner().invoke(command, ["--hold", "soon"])
    assert refused.exit_code == 2
    assert "'soon' is no duration: write seconds, or 250ms, 1.5s, 5m, 12h, 30d." in refused.output


def test_the_help_is_in_groups() -> None:
    shown = CliRunner().invoke(main, ["serve", "--help"]).output
    at = [shown.index(f"\n{title}:\n") for title in ("Options", *GROUPS)]
    assert at == sorted(at)
    assert shown.index("--workers") < at[1]
    assert "--max-age DURATION" in shown
    assert "250ms, 1.5s, 5m, 12h, 30d" in shown


def test_commands_name_variables_that_nobody_reads() -> None:
    result = CliRunner().invoke(main, ["nodes"], env={"PGMCP_DATABSE_URL": "x", "PGMCP_DATABASE_URL": None})
    assert result.exit_code == 2
    warned, error = result.output.splitlines()
    assert warned.startswith("Warning: PGMCP_DATABSE_URL is no variable of pgmcp")
    assert error.startswith("Error: No database.")
