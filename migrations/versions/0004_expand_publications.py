"""Expand: publications, and the SQL functions that publish in the caller's transaction.

Revision ID: 0004
Revises: 0003
"""

from hashlib import sha256

import sqlalchemy as sa
from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

FUNCTIONS = {
    "publish_resource_updated": "uri text",
    "publish_tools_list_changed": "",
    "publish_prompts_list_changed": "",
    "publish_resources_list_changed": "",
}

# Whoever may execute it needs no right on the table. The payload is the wake-up "there are publications".
FUNCTION = """
create function "{schema}".{name}({arguments}) returns void
language sql security definer set search_path = pg_catalog, pg_temp
as $$
    insert into "{schema}".publications (kind, uri) values ('{kind}', {uri});
    select pg_notify('{channel}', 'p')
$$"""


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    _publications(schema)
    channel = f"pgmcp_{sha256(schema.encode()).hexdigest()[:16]}_all"
    for name, arguments in FUNCTIONS.items():
        kind, uri = name.removeprefix("publish_"), "$1" if arguments else "null"
        op.execute(
            FUNCTION.format(schema=schema, name=name, arguments=arguments, kind=kind, uri=uri, channel=channel).strip()
        )
        op.execute(f'revoke execute on function "{schema}".{name} from public')


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    for name in FUNCTIONS:
        op.execute(f'drop function if exists "{schema}".{name}')
    op.drop_table("publications", schema=schema)


def _publications(schema: str) -> None:
    now, xact = sa.text("clock_timestamp()"), sa.text("(pg_current_xact_id()::text)::bigint")
    op.create_table(
        "publications",
        sa.Column("id", sa.Uuid(), nullable=False, server_default=sa.text("gen_random_uuid()")),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text()),
        sa.Column("xact", sa.BigInteger(), nullable=False, server_default=xact),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.PrimaryKeyConstraint("id", name=op.f("publications_pkey")),
        sa.CheckConstraint(
            "kind in ('tools_list_changed', 'prompts_list_changed', 'resources_list_changed', 'resource_updated')",
            name=op.f("publications_kind_check"),
        ),
        sa.CheckConstraint("(kind = 'resource_updated') = (uri is not null)", name=op.f("publications_uri_check")),
        sa.CheckConstraint("octet_length(uri) between 1 and 8192", name=op.f("publications_uri_length_check")),
        schema=schema,
    )
    op.create_index(op.f("publications_xact_idx"), "publications", ["xact"], schema=schema)
