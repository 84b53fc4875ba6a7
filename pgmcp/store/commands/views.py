"""Reads the public views for commands and pages."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from pgmcp.errors import SchemaError, SettingsError
from pgmcp.store.connection.one_shot import checked, connect, finish
from pgmcp.store.schema.public_views import COLUMNS

LIMIT_SECONDS = 10.0  # seconds

_ORDER = {
    "live_nodes": "node_name, started_at",
    "live_sessions": "created_at, session_id",
    "live_requests": "received_at, session_id",
    "live_streams": "session_id, kind, request_id",
    "takeover_history": "at, session_id, epoch",
}


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


def _plain(value: object) -> object:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value
