"""Contract: sessions without a state, an expiry of their own and a wanted owner. Older builds ask for the state.

Revision ID: 0021
Revises: 0020
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None
needs = "0020"


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    for column in ("wanted_owner", "state", "expires_at"):
        op.drop_column("sessions", column, schema=schema)


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.add_column("sessions", sa.Column("wanted_owner", sa.Uuid()), schema=schema)
    op.add_column(
        "sessions", sa.Column("state", sa.Text(), nullable=False, server_default=sa.text("'live'")), schema=schema
    )
    op.create_check_constraint(op.f("sessions_state_check"), "sessions", "state in ('live', 'ending')", schema=schema)
    op.add_column("sessions", sa.Column("expires_at", sa.DateTime(timezone=True)), schema=schema)
