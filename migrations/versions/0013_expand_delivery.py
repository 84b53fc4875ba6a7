"""Expand: when streams were delivered, so that retention counts from there, and waiting events by their topic.

Revision ID: 0013
Revises: 0012
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema = context.config.attributes["schema"]
    op.add_column("streams", sa.Column("released_at", sa.DateTime(timezone=True)), schema=schema)
    op.add_column(
        "streams", sa.Column("marked_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False), schema=schema
    )
    op.add_column("streams", sa.Column("marked_at", sa.DateTime(timezone=True)), schema=schema)
    op.create_index(
        "events_topic_idx", "events", ["stream", "topic", "seq"], schema=schema,
        postgresql_where=sa.text("topic is not null"),
    )  # fmt: skip


def downgrade() -> None:
    schema = context.config.attributes["schema"]
    op.drop_index("events_topic_idx", "events", schema=schema)
    for column in ("marked_at", "marked_seq", "released_at"):
        op.drop_column("streams", column, schema=schema)
