"""squawk finds nothing in the SQL of any migration that would stop a cluster at work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pgmcp.store.schema import alembic_run, migrations
from tests.harness.builds import newer, newer_migrations

SQUAWK = Path(sys.executable).with_name("squawk")
POSTGRESQL = "15"  # the oldest that is supported

FIRST = frozenset({
    "prefer-bigint-over-int",  # process ids, capacities, small counters
    "prefer-robust-stmts",  # all of it is one transaction with the revision's row
    "prefer-text-field",  # Alembic's own table
})  # fmt: skip
"""What the first migration may do: nothing was there before it."""

CONTRACT = frozenset({"ban-drop-column", "ban-drop-constraint", "ban-drop-not-null", "ban-drop-table"})
"""What contract steps are for: they look for the nodes that need it."""

EXPAND = frozenset({"ban-drop-not-null"})
"""A column that newer builds leave out stays readable for older ones."""

SMALL = {
    "0005": frozenset({"constraint-missing-not-valid", "disallowed-unique-constraint"}),
    "0007": frozenset({"require-concurrent-index-creation", "require-concurrent-index-deletion"}),
    "0012": frozenset({"require-concurrent-index-creation"}),
    "0013": frozenset({"require-concurrent-index-creation"}),
    "0014": frozenset({"require-concurrent-index-creation"}),
    "0016": frozenset({"require-concurrent-index-creation"}),
}
"""What is done to tables of few rows (``secrets``, ``sessions``), to the few of ``events`` with a topic, or to
``requests``, which keeps those of some minutes: an index takes tenths of a second there."""


def allowed(revision: str) -> frozenset[str]:
    script = alembic_run.scripts().get_revision(revision)
    if script.down_revision is None:
        return FIRST
    return (CONTRACT if hasattr(script.module, "needs") else EXPAND) | SMALL.get(revision, frozenset())


def lint(revision: str) -> set[str]:
    """The rules that a migration breaks, of those that are not allowed for its kind."""
    before = alembic_run.scripts().get_revision(revision).down_revision
    script = migrations.sql("pgmcp", f"{before}:{revision}" if before else revision)
    assert SQUAWK.is_file(), "squawk is missing: `make test` installs it"
    found = subprocess.run(
        [SQUAWK, "--pg-version", POSTGRESQL, "--reporter", "json", "--exclude", ",".join(sorted(allowed(revision)))],
        input=script,
        check=False,
        capture_output=True,
        timeout=30,
        text=True,
    )
    assert found.returncode in {0, 1}, found.stderr
    return {each["rule_name"] for each in json.loads(found.stdout)}


@pytest.mark.parametrize("revision", [each.revision for each in alembic_run.scripts().walk_revisions()])
def test_squawk_finds_nothing(revision: str) -> None:
    assert lint(revision) == set()


def test_it_would_find_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = newer_migrations(tmp_path / "migrations")
    step = folder / "versions/0901_contract_capabilities.py"
    step.write_text(
        step.read_text().replace(
            "op.drop_column(", "op.create_index('i', 'nodes', ['name'], schema='pgmcp')\n    op.drop_column("
        )
    )
    with newer(folder):
        assert lint("0901") == {"require-concurrent-index-creation"}
        monkeypatch.setitem(globals(), "CONTRACT", FIRST)
        assert lint("0901") == {"require-concurrent-index-creation", "ban-drop-column"}
