"""Expand: by which mark a repeat of a sealed message is known.

Revision ID: 0019
Revises: 0018
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

# An older build cannot read what is sealed: such sessions end, and their clients begin anew.
END_SEALED = """
delete from "{schema}".sessions s
where exists (select from "{schema}".requests r where r.session = s.id and r.mark is not null)
   or exists (
       select from "{schema}".streams st join "{schema}".events e on e.stream = st.id
       where st.session = s.id and substring(e.message from 1 for 1) = '\\x00'::bytea
   )
   or exists (
       select from "{schema}".journal j
       where j.session = s.id and j.kind <> 'version' and substring(j.body from 1 for 1) = '\\x00'::bytea
   )"""
AGAIN = """update "{schema}".schema_range set needs = '0001' where needs = '0019'"""


def upgrade() -> None:
    op.add_column("requests", sa.Column("mark", sa.LargeBinary()), schema=context.config.attributes["schema"])


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.execute(END_SEALED.format(schema=schema))
    op.execute(AGAIN.format(schema=schema))
    op.drop_column("requests", "mark", schema=schema)
