"""Expand: a term that is announced, and begins when all sessions have moved to it.

Revision ID: 0008
Revises: 0007
"""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

COLUMNS: dict[str, Any] = {
    "next_id": sa.Uuid(),
    "next_term": sa.BigInteger(),
    "next_mark": sa.Text(),
    "next_position": sa.BigInteger(),
    "next_session": sa.BigInteger(),
}


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    for name, kind in COLUMNS.items():
        op.add_column("history", sa.Column(name, kind), schema=schema)


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    for name in reversed(COLUMNS):
        op.drop_column("history", name, schema=schema)
