"""Expand: every table of pgmcp 0.1, their indexes, and the five public views.

Revision ID: 0001
Revises: none
"""

from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

VIEWS = ("live_nodes", "live_sessions", "live_requests", "live_streams", "takeover_history")
TABLES = ("secrets", "takeovers", "requests", "events", "streams", "journal", "sessions", "nodes")


def upgrade() -> None:
    schema: str = context.config.attributes["schema"]
    creators: tuple[Callable[[str], None], ...] = (
        _nodes, _sessions, _journal, _streams, _events, _requests, _takeovers, _secrets,
    )  # fmt: skip
    for create in creators:
        create(schema)
    text = Path(__file__).with_name("0001_views.sql").read_text(encoding="utf-8")
    for statement in text.replace("{schema}", schema).split(";\n"):
        if statement.strip():
            op.execute(statement.strip())


def downgrade() -> None:
    schema: str = context.config.attributes["schema"]
    for view in VIEWS:
        op.execute(f'drop view if exists "{schema}".{view}')
    for table in TABLES:
        op.drop_table(table, schema=schema)


def _time(name: str, *, filled: bool = True) -> "sa.Column[object]":
    """A point in time; filled by the database's clock unless a statement says otherwise."""
    default = sa.text("clock_timestamp()") if filled else None
    return sa.Column(name, sa.DateTime(timezone=True), nullable=not filled, server_default=default)


def _nodes(schema: str) -> None:
    op.create_table(
        "nodes",
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        _time("started_at"),
        _time("renewed_at"),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("line_pid", sa.Integer()),
        _time("line_started_at", filled=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("schema_revision", sa.Text(), nullable=False),
        sa.Column("capacity", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("node_id", name=op.f("nodes_pkey")),
        sa.CheckConstraint("state in ('joining', 'ready', 'draining', 'left', 'dead')", name=op.f("nodes_state_check")),
        schema=schema,
        postgresql_with={"fillfactor": "50"},
    )


def _sessions(schema: str) -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Uuid(), nullable=False),
        sa.Column("wanted_owner", sa.Uuid()),
        sa.Column("epoch", sa.BigInteger(), nullable=False, server_default=sa.text("1")),
        sa.Column("state", sa.Text(), nullable=False, server_default=sa.text("'live'")),
        sa.Column("transport", sa.Text(), nullable=False),
        sa.Column("protocol_version", sa.Text()),
        sa.Column("client_name", sa.Text()),
        sa.Column("client_version", sa.Text()),
        sa.Column("client_capabilities", sa.LargeBinary()),
        sa.Column("principal_client", sa.Text()),
        sa.Column("principal_issuer", sa.Text()),
        sa.Column("principal_subject", sa.Text()),
        sa.Column("restores", sa.Integer(), nullable=False, server_default=sa.text("0")),
        _time("created_at"),
        _time("last_active_at"),
        _time("expires_at", filled=False),
        sa.PrimaryKeyConstraint("id", name=op.f("sessions_pkey")),
        sa.UniqueConstraint("session_id", name=op.f("sessions_session_id_key")),
        sa.CheckConstraint("state in ('live', 'ending')", name=op.f("sessions_state_check")),
        sa.CheckConstraint("transport in ('streamable', 'sse')", name=op.f("sessions_transport_check")),
        schema=schema,
        postgresql_with={"fillfactor": "80"},
    )
    op.create_index(op.f("sessions_owner_idx"), "sessions", ["owner"], schema=schema)


def _journal(schema: str) -> None:
    op.create_table(
        "journal",
        sa.Column("session", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False, server_default=sa.text("''")),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        _time("written_at"),
        sa.PrimaryKeyConstraint("session", "kind", "detail", name=op.f("journal_pkey")),
        _of_session("journal", schema),
        schema=schema,
    )


def _streams(schema: str) -> None:
    op.create_table(
        "streams",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("session", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("next_seq", sa.BigInteger(), nullable=False, server_default=sa.text("1")),
        sa.Column("unfinished", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("sink", sa.Uuid()),
        sa.Column("sink_epoch", sa.BigInteger(), nullable=False, server_default=sa.text("1")),
        sa.Column("delivered_seq", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("floor_seq", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("closed", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        _time("closed_at", filled=False),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("streams_pkey")),
        sa.CheckConstraint("kind in ('request', 'standalone')", name=op.f("streams_kind_check")),
        _of_session("streams", schema),
        schema=schema,
        postgresql_with={"fillfactor": "70"},
    )
    op.create_index("streams_session_idx", "streams", ["session"], schema=schema)
    op.create_index(
        "streams_closed_at_idx", "streams", ["closed_at"], schema=schema,
        postgresql_where=sa.text("closed_at is not null"),
    )  # fmt: skip
    op.create_index(
        "streams_standalone_key", "streams", ["session"], unique=True, schema=schema,
        postgresql_where=sa.text("kind = 'standalone'"),
    )  # fmt: skip


def _events(schema: str) -> None:
    op.create_table(
        "events",
        sa.Column("stream", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.Column("topic", sa.Text()),
        _time("stored_at"),
        sa.PrimaryKeyConstraint("stream", "seq", name=op.f("events_pkey")),
        _of_stream("events", schema),
        schema=schema,
    )


def _requests(schema: str) -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("session", sa.BigInteger(), nullable=False),
        sa.Column("rpc_id", sa.Text()),
        sa.Column("method", sa.Text()),
        sa.Column("name", sa.Text()),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("context", sa.LargeBinary(), nullable=False),
        sa.Column("stream", sa.Uuid()),
        sa.Column("claim", sa.Uuid()),
        sa.Column("claimed_epoch", sa.BigInteger()),
        sa.Column("runs", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("open", sa.Boolean(), nullable=False),
        _time("accepted_at"),
        _time("claimed_at", filled=False),
        _time("finished_at", filled=False),
        sa.Column("outcome", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("requests_pkey")),
        sa.CheckConstraint(
            "outcome in ('answered', 'cancelled', 'delivered', 'lost')", name=op.f("requests_outcome_check")
        ),
        _of_session("requests", schema),
        _of_stream("requests", schema),
        schema=schema,
        postgresql_with={"fillfactor": "70"},
    )
    op.create_index("requests_session_position_idx", "requests", ["session", "position"], schema=schema)
    op.create_index("requests_stream_idx", "requests", ["stream"], schema=schema)
    op.create_index(
        "requests_unfinished_idx", "requests", ["session"], schema=schema,
        postgresql_where=sa.text("finished_at is null"),
    )  # fmt: skip
    op.create_index(
        "requests_finished_at_idx", "requests", ["finished_at"], schema=schema,
        postgresql_where=sa.text("stream is null and finished_at is not null"),
    )  # fmt: skip
    op.create_index(
        "requests_open_rpc_id", "requests", ["session", "rpc_id"], unique=True, schema=schema,
        postgresql_where=sa.text("open"),
    )  # fmt: skip


def _takeovers(schema: str) -> None:
    op.create_table(
        "takeovers",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("session", sa.BigInteger(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("from_node", sa.Uuid(), nullable=False),
        sa.Column("to_node", sa.Uuid(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        _time("at"),
        sa.PrimaryKeyConstraint("id", name=op.f("takeovers_pkey")),
        schema=schema,
    )


def _secrets(schema: str) -> None:
    op.create_table(
        "secrets",
        sa.Column("id", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name=op.f("secrets_pkey")),
        schema=schema,
    )
    op.create_index(op.f("secrets_purpose_idx"), "secrets", ["purpose"], schema=schema)


def _of_session(table: str, schema: str) -> sa.ForeignKeyConstraint:
    """Rows that go with their session."""
    return sa.ForeignKeyConstraint(
        ["session"], [f"{schema}.sessions.id"], name=op.f(f"{table}_session_fkey"), ondelete="CASCADE"
    )


def _of_stream(table: str, schema: str) -> sa.ForeignKeyConstraint:
    """Rows that go with their stream."""
    return sa.ForeignKeyConstraint(
        ["stream"], [f"{schema}.streams.id"], name=op.f(f"{table}_stream_fkey"), ondelete="CASCADE"
    )
