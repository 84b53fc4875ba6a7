"""Expand: how a node ended, for the history of takeovers.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("cause", sa.Text()), schema=context.config.attributes["schema"])


def downgrade() -> None:
    op.drop_column("nodes", "cause", schema=context.config.attributes["schema"])
