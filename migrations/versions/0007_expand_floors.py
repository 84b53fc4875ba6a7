"""Expand: what lets the message path pass over what is over while somebody holds a snapshot.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Triggers, so that older builds keep it too, with rights of their own. A renewal changes no state and calls nothing.
STATES = (
    """
create function "{schema}".note_node_state() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
    insert into "{schema}".node_states (node_id, name, state) values (new.node_id, new.name, new.state)
    on conflict (node_id) do update set state = excluded.state;
    return null;
end
$$""",
    'revoke execute on function "{schema}".note_node_state() from public',
    """create trigger note_joined after insert on "{schema}".nodes
for each row execute function "{schema}".note_node_state()""",
    """create trigger note_state after update of state on "{schema}".nodes
for each row when (old.state is distinct from new.state) execute function "{schema}".note_node_state()""",
    'insert into "{schema}".node_states (node_id, name, state) select node_id, name, state from "{schema}".nodes',
)
# The default comes second: rows that are there need no rewriting, and count as seen by nobody.
XACT = (
    'alter table "{schema}".requests add column xact bigint not null default 0',
    'alter table "{schema}".requests alter column xact set default (pg_current_xact_id()::text)::bigint',
)


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.create_table(
        "node_states",
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("node_id", name=op.f("node_states_pkey")),
        sa.ForeignKeyConstraint(
            ["node_id"], [f"{schema}.nodes.node_id"], name=op.f("node_states_node_id_fkey"), ondelete="CASCADE"
        ),
        schema=schema,
    )
    for text in XACT:
        op.execute(text.format(schema=schema))
    unfinished = sa.text("finished_at is null")
    op.create_index(
        op.f("requests_unfinished_session_idx"),
        "requests",
        [sa.text("(session + 0)"), sa.text("(xact + 0)")],
        schema=schema,
        postgresql_where=unfinished,
    )
    op.create_index(
        op.f("requests_unfinished_xact_idx"),
        "requests",
        ["xact"],
        schema=schema,
        postgresql_where=sa.text("outcome is null"),
    )
    op.drop_index(op.f("requests_unfinished_idx"), "requests", schema=schema)
    for text in STATES:  # last: from the first trigger on no node can renew until this is committed
        op.execute(text.format(schema=schema))


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.create_index(
        op.f("requests_unfinished_idx"), "requests", ["session"], schema=schema,
        postgresql_where=sa.text("finished_at is null"),
    )  # fmt: skip
    op.drop_column("requests", "xact", schema=schema)
    for name in ("note_state", "note_joined"):
        op.execute(f'drop trigger {name} on "{schema}".nodes')
    op.execute(f'drop function "{schema}".note_node_state()')
    op.drop_table("node_states", schema=schema)
