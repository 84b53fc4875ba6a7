"""A made-up newer build: this one, with an expand and a contract step more, whose nodes write one column less.

0900 lets nodes leave out ``sessions.client_capabilities``, 0901 drops it: only builds that know 0900 go on after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pgmcp.store.schema import alembic_run, revisions
from tests.harness.processes import REPOSITORY

STEP = '''"""{kind}: client_capabilities are {fate}."""
import sqlalchemy as sa
from alembic import context, op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None
{needs}

def upgrade():
    {up}


def downgrade():
    {down}
'''
SCHEMA = "schema=context.config.attributes['schema']"
ALTER = f"op.alter_column('sessions', 'client_capabilities', nullable=True, {SCHEMA})"
DROP = f"op.drop_column('sessions', 'client_capabilities', {SCHEMA})"
ADD = f"op.add_column('sessions', sa.Column('client_capabilities', sa.LargeBinary()), {SCHEMA})"


def newer_migrations(folder: Path) -> Path:
    """The migrations of the newer build."""
    shutil.copytree(REPOSITORY / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
    head = alembic_run.scripts().get_current_head()
    steps: dict[str, dict[str, Any]] = {
        "0900_expand_capabilities.py": {
            "kind": "Expand", "fate": "optional", "revision": "0900", "before": head, "needs": "",
            "up": ALTER, "down": "pass",
        },
        "0901_contract_capabilities.py": {
            "kind": "Contract", "fate": "gone", "revision": "0901", "before": "0900", "needs": 'needs = "0900"\n',
            "up": DROP, "down": ADD,
        },
    }  # fmt: skip
    for name, values in steps.items():
        (folder / "versions" / name).write_text(STEP.format(**values))
    return folder


@contextmanager
def newer(folder: Path) -> Iterator[None]:
    """This process is of the newer build, as far as it migrates and joins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revisions, "folder", lambda: folder)
        alembic_run.scripts.cache_clear()
        try:
            yield
        finally:
            alembic_run.scripts.cache_clear()


def newer_build(folder: Path) -> dict[str, str]:
    """Install the newer build into a folder; the variables with which ``python -m pgmcp`` is of it."""
    shutil.copytree(REPOSITORY / "pgmcp", folder / "pgmcp", ignore=shutil.ignore_patterns("__pycache__"))
    newer_migrations(folder / "migrations")
    statements = folder / "pgmcp/store/sql/inbox.sql"
    text, written = statements.read_text(), "client_version = $6, client_capabilities = $7\n    from counted where"
    assert text.count(written) == 1
    # The seventh value is still given: PostgreSQL has to be told its type.
    statements.write_text(
        text.replace(written, "client_version = $6\n    from counted where $7::bytea is not null and")
    )
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
