from pathlib import Path
from typing import Any

import pytest

from pgmcp.cli.options import load
from pgmcp.cli.reference import reference
from pgmcp.errors import SettingsError
from pgmcp.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_what_the_settings_say() -> None:
    assert (DOCS / "settings.md").read_text() == reference(), "run `make reference`"


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
    ],
)
def test_what_cannot_work_is_refused_with_a_hint(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="refused"):
        Settings(**values)
