"""Reads the public views for commands and pages."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from pgmcp.errors import SchemaError, SettingsError
from pgmcp.store.command_connection import checked, connect, finish

LIMIT_SECONDS = 10.0  # seconds

COLUMNS: dict[str, tuple[str, ...]] = {
    "live_nodes": (
        "node_id", "node_name", "state", "address", "lease_remaining", "sessions", "streams", "started_at", "version",
    ),
    "live_sessions": (
        "session_id", "node_name", "node_id", "epoch", "transport", "protocol_version", "client_name",
        "client_version", "principal", "created_at", "last_active_at", "in_flight", "open_streams",
    ),
    "live_requests": ("session_id", "request_id", "method", "name", "node_name", "state", "received_at", "age"),
    "live_streams": ("session_id", "kind", "request_id", "sink_node", "next_seq", "lag"),
    "takeover_history": ("session_id", "from_node", "to_node", "epoch", "reason", "at"),
}  # fmt: skip
"""The public views and their columns: a contract, they only grow."""

_ORDER = {
    "live_nodes": "node_name, started_at",
    "live_sessions": "created_at, session_id",
    "live_requests": "received_at, session_id",
    "live_streams": "session_id, kind, request_id",
    "takeover_history": "at, session_id, epoch",
}

_PRESENT = """
select c.relname::text as view, array_agg(a.attname::text) as columns
  from pg_catalog.pg_class c
  join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.relnamespace = to_regnamespace(quote_ident($1)) and c.relkind = 'v'
 group by c.relname
"""


def fetch(database_url: str, schema: str, view: str, *, most: int = 10_000) -> list[dict[str, object]]:
    """The rows of a public view as JSON can carry them; call it outside any event loop.

    Args:
        database_url: where the cluster's database is; a transaction pooler will do.
        schema: the schema of pgmcp's tables.
        view: one of ``COLUMNS``.
        most: rows to return at most.

    Returns:
        One dict for each row, columns in the view's order. Ids and times are text (ISO 8601), intervals are
        seconds as float.

    Raises:
        SettingsError: there is no such public view, or the schema name is malformed.
        DatabaseUnavailable: no answer within ``LIMIT_SECONDS``.
        SchemaError: the view is missing or may not be read; the message says what to run.
    """
    if view not in COLUMNS:
        message = f"No public view {view!r}. There are: {', '.join(COLUMNS)}."
        raise SettingsError(message)
    statement = f'select * from "{checked(schema)}".{view} order by {_ORDER[view]} limit {int(most)}'  # noqa: S608

    async def read() -> list[dict[str, object]]:
        connection = await connect(database_url)
        try:
            async with connection.transaction(readonly=True):
                rows = await connection.fetch(statement, timeout=LIMIT_SECONDS)
        except asyncpg.UndefinedTableError as error:
            message = f"There is no view {view} in schema {schema}. Run `pgmcp db upgrade`, or check --schema."
            raise SchemaError(message) from error
        finally:
            connection.terminate()
        return [{name: _plain(value) for name, value in row.items()} for row in rows]

    return finish(read, database_url, LIMIT_SECONDS)


async def missing(connection: asyncpg.Connection, schema: str) -> list[str]:
    """What the database lacks of the public views, as ``view`` or ``view.column``."""
    rows = await connection.fetch(_PRESENT, schema, timeout=LIMIT_SECONDS)
    present: dict[str, set[str]] = {row["view"]: set(row["columns"]) for row in rows}
    lacking = [view for view in COLUMNS if view not in present]
    for view in present.keys() & COLUMNS.keys():
        lacking += [f"{view}.{column}" for column in COLUMNS[view] if column not in present[view]]
    return sorted(lacking)


def _plain(value: object) -> object:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value
