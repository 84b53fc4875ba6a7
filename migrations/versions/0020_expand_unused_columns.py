"""Expand: nodes need not say a capacity, which nobody has ever read, and the views look at no session's state, which
was the same for all. The contract steps that follow take both away, with columns that no build has used.

Revision ID: 0020
Revises: 0019
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import context, op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_views("true")  # first, as whoever reads them does: views, then tables
    op.alter_column("nodes", "capacity", nullable=True, schema=context.config.attributes["schema"])


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    _create_views("s.state = 'live'")
    nodes = sa.table("nodes", sa.column("capacity", sa.Integer()), schema=schema)
    op.execute(nodes.update().where(nodes.c.capacity.is_(None)).values(capacity=10_000))
    op.alter_column("nodes", "capacity", nullable=False, schema=schema)


def _create_views(live: str) -> None:
    schema: str = context.config.attributes["schema"]
    text = Path(__file__).with_name("0020_views.sql").read_text(encoding="utf-8")
    for statement in text.replace("{live}", live).replace("{schema}", schema).split(";\n"):
        if statement.strip():
            op.execute(statement.strip())
