"""Expand: where anonymous sessions were opened from, so that one address has a share of them. The view of sessions says
nothing of a client that does not count (``--bind-to subject``).

Revision ID: 0016
Revises: 0015
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

# The view's columns are those of 0001.
SESSIONS = """
create or replace view "{schema}".live_sessions as
select s.session_id,
       n.name as node_name,
       s.owner as node_id,
       s.epoch,
       s.transport,
       s.protocol_version,
       s.client_name,
       s.client_version,
       -- subject@issuer via client, with the parts that are known; NULL for an anonymous session
       nullif(concat_ws(' via ',
                        nullif(concat_ws('@', s.principal_subject, s.principal_issuer), ''),
                        {client}), '') as principal,
       s.created_at,
       s.last_active_at,
       (select count(*) from "{schema}".requests r
         where r.session = s.id and r.rpc_id is not null and r.finished_at is null) as in_flight,
       (select count(*) from "{schema}".streams t
         where t.session = s.id and not t.closed and t.sink is not null) as open_streams
  from "{schema}".sessions s
  left join "{schema}".nodes n on n.node_id = s.owner
 where s.state = 'live'
"""


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.add_column("sessions", sa.Column("address", sa.Text()), schema=schema)
    op.create_index(
        "sessions_address_idx",
        "sessions",
        ["address"],
        schema=schema,
        postgresql_where=sa.text("address is not null"),
    )
    op.execute(SESSIONS.format(schema=schema, client="nullif(s.principal_client, '')"))


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    op.execute(SESSIONS.format(schema=schema, client="s.principal_client"))
    op.drop_index("sessions_address_idx", "sessions", schema=schema)
    op.drop_column("sessions", "address", schema=schema)
