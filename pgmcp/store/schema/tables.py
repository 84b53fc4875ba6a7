"""The database as SQLAlchemy Core metadata: the single source that the migrations are checked against.

Invariants:
- Payloads are ``bytea``: NUL escapes, key order and big numbers survive byte for byte. Those that begin with a zero
  byte are sealed (``store/encryption/payloads.py``); ``requests.mark`` tells a repeat of one that is.
- Tables hang off their session and go with it, but for ``cluster``, ``history``, ``nodes``, ``node_states``,
  ``publications``, ``schema_range``, ``secrets``, ``spent_states`` and ``takeovers``.
- ``nodes`` has no index on its times, and room in its pages: renewals stay heap-only.
- ``requests.position`` comes from one sequence; a message whose 202 was sent before another was accepted
  has the smaller position, which is the order in which an owner takes messages.
- An event with a topic may give way while it waits: to a newer one of the same topic, which is no loss, or when too
  many wait. What is lost that way, or to retention, lies at or below its stream's ``floor_seq``.
- Age counts from delivery: ``streams.released_at`` is when a client last let go of the stream, and up to ``marked_seq``
  a standalone stream was delivered at ``marked_at`` or before.
- ``node_states`` follows ``nodes`` by triggers and changes only with a node's state: renewals leave a version of the
  node's row each second, which the message path must not walk while a snapshot holds them.
- ``publications.xact`` and ``requests.xact`` are the transaction that wrote the row: with a snapshot they tell which
  rows a reader has not seen, in whatever order transactions commit. The partial indexes on the latter are made so that
  whoever looks above a floor finds no other index that fits, whatever statistics say: others lead through what is over.
- ``events.message`` is stored as it is (``external``): a piece of a large one is read without the others.
- ``streams.replaced_at`` has the last replacements of a sink on a living node, and nothing on nearly every row.
- ``sessions.address`` is where a session was opened from whose caller has no name, and nothing for others.
- At most one request of a session with a given JSON-RPC id is open (``requests_open_rpc_id``).
- Revisions are four digits that ascend. A build fits a database whose revision is not older than its ``OLDEST``, while
  it knows the revision in ``schema_range.needs``, which only contract steps raise.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)

NAMES = {
    "pk": "%(table_name)s_pkey",
    "fk": "%(table_name)s_%(column_0_name)s_fkey",
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}
NOW = text("clock_timestamp()")
XACT = text("(pg_current_xact_id()::text)::bigint")
TIME = DateTime(timezone=True)

PUBLISHING = (
    "publish_resource_updated(text)",
    "publish_tools_list_changed()",
    "publish_prompts_list_changed()",
    "publish_resources_list_changed()",
)
FUNCTIONS = (*PUBLISHING, "in_use(bigint)")


def _session_key(*, primary: bool = False) -> Column[int]:
    return Column(
        "session",
        BigInteger,
        ForeignKey("sessions.id", ondelete="CASCADE"),
        primary_key=primary,
        nullable=False,
    )


metadata = MetaData(naming_convention=NAMES)

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("started_at", TIME, nullable=False, server_default=NOW),
    Column("renewed_at", TIME, nullable=False, server_default=NOW),
    Column("expires_at", TIME, nullable=False),
    Column("line_pid", Integer),
    Column("line_started_at", TIME),
    Column("version", Text, nullable=False),
    Column("schema_revision", Text, nullable=False),
    Column("cause", Text),
    Column("schema_oldest", Text),
    Column("schema_newest", Text),
    CheckConstraint("state in ('joining', 'ready', 'draining', 'left', 'dead')", name="state"),
    postgresql_with={"fillfactor": "50"},
)

node_states = Table(
    "node_states",
    metadata,
    Column("node_id", Uuid, ForeignKey("nodes.node_id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("session_id", Text, nullable=False, unique=True),
    Column("owner", Uuid, nullable=False, index=True),
    Column("epoch", BigInteger, nullable=False, server_default=text("1")),
    Column("transport", Text, nullable=False),
    Column("protocol_version", Text),
    Column("client_name", Text),
    Column("client_version", Text),
    Column("client_capabilities", LargeBinary),
    Column("principal_client", Text),
    Column("principal_issuer", Text),
    Column("principal_subject", Text),
    Column("restores", Integer, nullable=False, server_default=text("0")),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("last_active_at", TIME, nullable=False, server_default=NOW),
    Column("address", Text),
    Index("sessions_address_idx", "address", postgresql_where=text("address is not null")),
    Index(
        "sessions_caller_idx",
        text("left(coalesce(principal_subject, principal_client), 100)"),
        postgresql_where=text("principal_client is not null"),
    ),
    CheckConstraint("transport in ('streamable', 'sse')", name="transport"),
    postgresql_with={"fillfactor": "80"},
)

journal = Table(
    "journal",
    metadata,
    _session_key(primary=True),
    Column("kind", Text, primary_key=True),
    Column("detail", Text, primary_key=True, server_default=text("''")),
    Column("body", LargeBinary, nullable=False),
    Column("written_at", TIME, nullable=False, server_default=NOW),
)

streams = Table(
    "streams",
    metadata,
    Column("id", Uuid, primary_key=True),
    _session_key(),
    Column("kind", Text, nullable=False),
    Column("next_seq", BigInteger, nullable=False, server_default=text("1")),
    Column("unfinished", Integer, nullable=False, server_default=text("0")),
    Column("sink", Uuid),
    Column("sink_epoch", BigInteger, nullable=False, server_default=text("1")),
    Column("delivered_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("floor_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("closed", Boolean, nullable=False, server_default=text("false")),
    Column("closed_at", TIME),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("replaced_at", ARRAY(TIME)),
    Column("released_at", TIME),
    Column("marked_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("marked_at", TIME),
    CheckConstraint("kind in ('request', 'standalone')", name="kind"),
    Index("streams_session_idx", "session"),
    Index("streams_closed_at_idx", "closed_at", postgresql_where=text("closed_at is not null")),
    Index("streams_standalone_key", "session", unique=True, postgresql_where=text("kind = 'standalone'")),
    postgresql_with={"fillfactor": "70"},
)

events = Table(
    "events",
    metadata,
    Column("stream", Uuid, ForeignKey("streams.id", ondelete="CASCADE"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("topic", Text),
    Column("stored_at", TIME, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("stream", "seq"),
    Index("events_topic_idx", "stream", "topic", "seq", postgresql_where=text("topic is not null")),
)

requests = Table(
    "requests",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("position", BigInteger, Identity(always=True), nullable=False),
    _session_key(),
    Column("rpc_id", Text),
    Column("method", Text),
    Column("name", Text),
    Column("body", LargeBinary, nullable=False),
    Column("context", LargeBinary, nullable=False),
    Column("stream", Uuid, ForeignKey("streams.id", ondelete="CASCADE")),
    Column("claim", Uuid),
    Column("claimed_epoch", BigInteger),
    Column("runs", Integer, nullable=False, server_default=text("0")),
    Column("open", Boolean, nullable=False),
    Column("accepted_at", TIME, nullable=False, server_default=NOW),
    Column("claimed_at", TIME),
    Column("finished_at", TIME),
    Column("outcome", Text),
    Column("xact", BigInteger, nullable=False, server_default=XACT),
    Column("mark", LargeBinary),
    CheckConstraint("outcome in ('answered', 'cancelled', 'delivered', 'lost')", name="outcome"),
    Index("requests_session_position_idx", "session", "position"),
    Index("requests_stream_idx", "stream"),
    Index(
        "requests_unfinished_session_idx",
        text("(session + 0)"),
        text("(xact + 0)"),
        postgresql_where=text("finished_at is null"),
    ),
    Index("requests_unfinished_xact_idx", "xact", postgresql_where=text("outcome is null")),
    Index(
        "requests_finished_at_idx", "finished_at", postgresql_where=text("stream is null and finished_at is not null")
    ),
    Index("requests_open_rpc_id", "session", "rpc_id", unique=True, postgresql_where=text("open")),
    Index(
        "requests_rpc_id_idx",
        text("(session + 0)"),
        text("(rpc_id || '')"),
        "position",
        postgresql_where=text("rpc_id is not null"),
    ),
    postgresql_with={"fillfactor": "70"},
)

takeovers = Table(
    "takeovers",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("session", BigInteger, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("from_node", Uuid, nullable=False),
    Column("to_node", Uuid, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", TIME, nullable=False, server_default=NOW),
)

publications = Table(
    "publications",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=text("gen_random_uuid()")),
    Column("kind", Text, nullable=False),
    Column("uri", Text),
    Column("xact", BigInteger, nullable=False, server_default=XACT, index=True),
    Column("published_at", TIME, nullable=False, server_default=NOW),
    CheckConstraint(
        "kind in ('tools_list_changed', 'prompts_list_changed', 'resources_list_changed', 'resource_updated')",
        name="kind",
    ),
    CheckConstraint("(kind = 'resource_updated') = (uri is not null)", name="uri"),
    CheckConstraint("octet_length(uri) between 1 and 8192", name="uri_length"),
)

history = Table(
    "history",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("term", BigInteger, nullable=False),
    Column("mark", Text, nullable=False),
    Column("position", BigInteger, nullable=False, server_default=text("0")),
    Column("began_at", TIME, nullable=False, server_default=NOW),
    Column("next_id", Uuid),
    Column("next_term", BigInteger),
    Column("next_mark", Text),
    Column("next_position", BigInteger),
    Column("next_session", BigInteger),
)

cluster = Table(
    "cluster",
    metadata,
    Column("one", Boolean, primary_key=True, server_default=text("true")),
    Column("serves", Text),
    Column("made_by", Text),
    CheckConstraint("one", name="one"),
)

secrets = Table(
    "secrets",
    metadata,
    Column("id", Integer, Identity(always=True), primary_key=True),
    Column("purpose", Text, nullable=False, index=True),
    Column("key", LargeBinary, nullable=False),
    Column("created_at", TIME, nullable=False, server_default=NOW),
    Column("generation", BigInteger),
    Column("wrapped_by", LargeBinary),
    UniqueConstraint("purpose", "generation", name="secrets_generation_key"),
)

spent_states = Table(
    "spent_states",
    metadata,
    Column("state", LargeBinary, primary_key=True),
    Column("spender", Uuid, nullable=False),
    Column("expires_at", TIME, nullable=False, index=True),
)

schema_range = Table(
    "schema_range",
    metadata,
    Column("one", Boolean, primary_key=True, server_default=text("true")),
    Column("needs", Text, nullable=False),
    CheckConstraint("one", name="one"),
)
