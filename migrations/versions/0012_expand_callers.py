"""Expand: the sessions of a caller are found by an index. There are 10,000 sessions or so: it is made in some 50 ms.

Revision ID: 0012
Revises: 0011
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# Subjects may be longer than what an index takes.
CALLER = "left(coalesce(principal_subject, principal_client), 100)"


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.create_index(
        "sessions_caller_idx",
        "sessions",
        [sa.text(CALLER)],
        schema=schema,
        postgresql_where=sa.text("principal_client is not null"),
    )


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.drop_index("sessions_caller_idx", "sessions", schema=schema)
