"""Expand: key rings whose keys follow one another and may lie wrapped, and requestStates that were used.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema = context.config.attributes["schema"]
    op.add_column("secrets", sa.Column("generation", sa.BigInteger()), schema=schema)
    op.add_column("secrets", sa.Column("wrapped_by", sa.LargeBinary()), schema=schema)
    op.create_unique_constraint(op.f("secrets_generation_key"), "secrets", ["purpose", "generation"], schema=schema)
    op.create_table(
        "spent_states",
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.Column("spender", sa.Uuid(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("state", name=op.f("spent_states_pkey")),
        schema=schema,
    )
    op.create_index(op.f("spent_states_expires_at_idx"), "spent_states", ["expires_at"], schema=schema)


def downgrade() -> None:
    schema = context.config.attributes["schema"]
    op.drop_table("spent_states", schema=schema)
    op.drop_constraint(op.f("secrets_generation_key"), "secrets", schema=schema)
    op.drop_column("secrets", "wrapped_by", schema=schema)
    op.drop_column("secrets", "generation", schema=schema)
