"""A made-up newer build: this one, with an expand and a contract step more, whose nodes write one column less.

0900 lets nodes leave out ``nodes.capacity``, 0901 drops it: only builds that know 0900 go on after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pgmcp.store import alembic_run, revisions
from tests.harness.processes import REPOSITORY

STEP = '''"""{kind}: capacity is {fate}."""
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
ALTER = "op.alter_column('nodes', 'capacity', nullable={}, schema=context.config.attributes['schema'])"
DROP = "op.drop_column('nodes', 'capacity', schema=context.config.attributes['schema'])"
ADD = "op.add_column('nodes', sa.Column('capacity', sa.Integer()), schema=context.config.attributes['schema'])"


def newer_migrations(folder: Path) -> Path:
    """The migrations of the newer build."""
    shutil.copytree(REPOSITORY / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
    head = alembic_run.scripts().get_current_head()
    steps: dict[str, dict[str, Any]] = {
        "0900_expand_capacity.py": {
            "kind": "Expand", "fate": "optional", "revision": "0900", "before": head, "needs": "",
            "up": ALTER.format(True), "down": "pass",
        },
        "0901_contract_capacity.py": {
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
    statements = folder / "pgmcp/store/sql/nodes.sql"
    text = statements.read_text()
    for before, after in (("_revision, capacity,", "_revision,"), ("$6, $7, $8, $9 from", "$6, $8, $9 from")):
        assert text.count(before) == 1
        text = text.replace(before, after)
    # The seventh value is still given: PostgreSQL has to be told its type.
    statements.write_text(text.replace("select needs, coalesce", "select needs, $7::integer as capacity, coalesce"))
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
