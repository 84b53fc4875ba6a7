"""Expand: which history the database follows, so that a change of the primary that lost commits is noticed.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Numbers jump, so what waits is counted. The view's columns are those of 0001.
STREAMS = """
create or replace view "{schema}".live_streams as
select s.session_id,
       t.kind,
       -- a batch has one stream: its first request stands for it
       (select r.rpc_id from "{schema}".requests r
         where r.stream = t.id and r.rpc_id is not null order by r.position limit 1) as request_id,
       n.name as sink_node,
       t.next_seq,
       {lag} as lag
  from "{schema}".streams t
  join "{schema}".sessions s on s.id = t.session
  left join "{schema}".nodes n on n.node_id = t.sink
 where not t.closed
"""
ROW = """insert into "{schema}".history (id, term, mark) values (gen_random_uuid(), 0, '')"""
LAG = '(select count(*) from "{schema}".events e where e.stream = t.id and e.seq > t.delivered_seq)'


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.create_table(
        "history",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("mark", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("began_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="history_pkey"),
        schema=schema,
    )
    op.execute(ROW.format(schema=schema))
    op.execute(STREAMS.format(schema=schema, lag=LAG.format(schema=schema)))


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.execute(STREAMS.format(schema=schema, lag="t.next_seq - 1 - t.delivered_seq"))
    op.drop_table("history", schema=schema)
