"""Expand: when listeners took a stream from each other.

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema = context.config.attributes["schema"]
    op.add_column("streams", sa.Column("replaced_at", sa.ARRAY(sa.DateTime(timezone=True))), schema=schema)


def downgrade() -> None:
    schema = context.config.attributes["schema"]
    op.drop_column("streams", "replaced_at", schema=schema)
