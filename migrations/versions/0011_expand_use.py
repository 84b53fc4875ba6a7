"""Expand: whether a session is in use, asked after its row was locked.

Revision ID: 0011
Revises: 0010
"""

from alembic import context, op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# A statement's own subqueries see what was committed when it began; a volatile function sees what is committed when
# it is called, so also what a lock has waited for.
IN_USE = """
create function "{schema}".in_use(session bigint) returns boolean
language plpgsql volatile
as $$
begin
    return exists (select from "{schema}".requests r where r.session + 0 = in_use.session and r.finished_at is null)
        or exists (select from "{schema}".streams st where st.session = in_use.session and st.sink is not null);
end
$$"""


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.execute(IN_USE.format(schema=schema).strip())


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.execute(f'drop function if exists "{schema}".in_use')
