"""Options on their way to another pgmcp process."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from pgmcp.cli.options import arguments, load, settings_options


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ({"access_log": True}, ["--access-log"]),
        ({"access_log": False}, ["--no-access-log"]),
        ({"allowed_hosts": ("a", "b"), "port": 1}, ["--allowed-hosts", "a,b", "--port", "1"]),
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
