"""Expand: what the cluster serves, so that nodes of another server are refused.

Revision ID: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ROW = """insert into "{schema}".cluster default values"""


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.create_table(
        "cluster",
        sa.Column("one", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("serves", sa.Text(), nullable=True),
        sa.Column("made_by", sa.Text(), nullable=True),
        sa.CheckConstraint("one", name=op.f("cluster_one_check")),
        sa.PrimaryKeyConstraint("one", name=op.f("cluster_pkey")),
        schema=schema,
    )
    op.execute(ROW.format(schema=schema))


def downgrade() -> None:
    op.drop_table("cluster", schema=context.config.attributes["schema"])
