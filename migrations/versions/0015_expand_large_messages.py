"""Expand: messages are stored as they are, so that large ones can be read in pieces.

Revision ID: 0015
Revises: 0014
"""

from alembic import context, op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

# Of a compressed value the last piece costs as much as all of it. What is stored already stays as it is.
STORAGE = """alter table "{schema}".events alter column message set storage {storage}"""


def upgrade() -> None:
    op.execute(STORAGE.format(schema=context.config.attributes["schema"], storage="external"))


def downgrade() -> None:
    op.execute(STORAGE.format(schema=context.config.attributes["schema"], storage="extended"))
