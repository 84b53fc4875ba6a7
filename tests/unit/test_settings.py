from pathlib import Path
from typing import Any

import pytest

from pgmcp.cli.options import GROUPS, load
from pgmcp.cli.reference import reference
from pgmcp.errors import SettingsError
from pgmcp.settings import Settings, unknown_variables, written

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_what_the_settings_say() -> None:
    assert (DOCS / "settings.md").read_text() == reference(), "run `make reference`"


def test_each_setting_stands_in_one_group_of_the_help() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(Settings.model_fields)


def test_the_reference_says_what_may_be_given() -> None:
    page = reference()
    for row in (
        "| `--pool-size` | `PGMCP_POOL_SIZE` | `6` | 3 to 64 |",
        "| `--workers` | `PGMCP_WORKERS` | `1` | 1 to 64 |",
        "| `--max-age` | `PGMCP_MAX_AGE` | `7d` | more than 0 |",
        "| `--response` | `PGMCP_RESPONSE` | `sse` | sse, json, auto |",
    ):
        assert row in page


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("30d", 2592000), ("12h", 43200), ("5m", 300), ("1.5s", 1.5), ("250ms", 0.25), ("90", 90), (" 2 s ", 2), (7, 7)],
)
def test_durations_have_units(given: Any, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(idle_timeout=given).idle_timeout == seconds
    monkeypatch.setenv("PGMCP_IDLE_TIMEOUT", str(given))
    assert Settings().idle_timeout == seconds
    assert Settings(idle_timeout=written(seconds)).idle_timeout == seconds


@pytest.mark.parametrize("given", ["1e3", "-1s", "nan", "inf", "", "5M", float("inf"), float("nan"), "36501d"])
def test_what_is_no_duration_is_refused(given: Any) -> None:
    for name in ("key_rotation", "wait"):
        with pytest.raises(SettingsError, match=name):
            Settings(**{name: given})


def test_variables_that_nobody_reads_are_named() -> None:
    assert unknown_variables(["PGMCP_SCHEMA", "PGMCP_WORKERS", "PGMCP_PG_BIN", "PATH", "PGMCP"]) == []
    near, far = unknown_variables(["PGMCP_RETENTON", "PGMCP_X"])
    assert near.endswith("is PGMCP_RETENTION meant?")
    assert far == "PGMCP_X is no variable of pgmcp and has no effect: `pgmcp serve --help` lists all."


def test_variables_and_options_take_several_names_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGMCP_ALLOWED_HOSTS", "a.example, b.example:*,")
    assert Settings().allowed_hosts == ("a.example", "b.example:*")
    assert load({"allowed_hosts": ("c.example",)}).allowed_hosts == ("c.example",)


def test_an_option_goes_before_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGMCP_SCHEMA", "theirs")
    assert Settings().schema_name == "theirs"
    assert load({"schema_name": "ours"}).schema_name == "ours"


@pytest.mark.parametrize(
    "values",
    [
        {"trust": 12.0},
        {"trust": 3.0},
        {"ttl": 7.0},
        {"renew": 6.0},
        {"schema_name": "Robert'); drop table"},
        {"port": 70_000},
        {"response": "xml"},
        {"no_such_setting": 1},
        {"hold": "1 fortnight"},
        {"hold": "-5s"},
    ],
)
def test_what_cannot_work_is_refused_with_a_hint(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="refused"):
        Settings(**values)


def test_origins_are_compared_as_browsers_write_them() -> None:
    settings = Settings(allowed_origins="https://App.example/", cors_origins=("http://LOCALHOST:*", "*"))
    assert settings.allowed_origins == ("https://app.example",)
    assert settings.cors_origins == ("http://localhost:*", "*")
