"""Expand: the last request of a session that had an id, also when it is over.

Revision ID: 0014
Revises: 0013
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.create_index(
        op.f("requests_rpc_id_idx"),
        "requests",
        [sa.text("(session + 0)"), sa.text("(rpc_id || '')"), "position"],
        schema=schema,
        postgresql_where=sa.text("rpc_id is not null"),
    )


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.drop_index(op.f("requests_rpc_id_idx"), "requests", schema=schema)
