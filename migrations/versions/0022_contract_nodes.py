"""Contract: nodes without a capacity, which older builds write. A step of its own: no transaction locks both tables.

Revision ID: 0022
Revises: 0021
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None
needs = "0020"


def upgrade() -> None:
    op.drop_column("nodes", "capacity", schema=context.config.attributes["schema"])


def downgrade() -> None:
    op.add_column("nodes", sa.Column("capacity", sa.Integer()), schema=context.config.attributes["schema"])
