"""Expand: which builds the schema fits, and which schemas a node fits.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    made = op.create_table(
        "schema_range",
        sa.Column("one", sa.Boolean(), nullable=False, server_default=sa.text("true")),
        sa.Column("needs", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("one", name=op.f("schema_range_pkey")),
        sa.CheckConstraint("one", name=op.f("schema_range_one_check")),
        schema=schema,
    )
    op.bulk_insert(made, [{"needs": "0001"}])
    for column in ("schema_oldest", "schema_newest"):
        op.add_column("nodes", sa.Column(column, sa.Text()), schema=schema)


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    for column in ("schema_newest", "schema_oldest"):
        op.drop_column("nodes", column, schema=schema)
    op.drop_table("schema_range", schema=schema)
