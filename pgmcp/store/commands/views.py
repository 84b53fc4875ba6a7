"""Reads the public views for commands and pages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from pgmcp.errors import SchemaError, SessionUnknown, SettingsError
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

_CALLED = """
(session_id = $1
 or left(session_id, -32) || left(encode(sha256(convert_to(session_id, 'UTF8')), 'hex'), 32) = $1)
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
        async with _reading(database_url, schema) as connection:
            return await _rows(connection, statement)

    return finish(read, database_url, LIMIT_SECONDS)


def session(database_url: str, schema: str, called: str) -> dict[str, list[dict[str, object]]]:
    """What the public views say of one session; call it outside any event loop.

    Args:
        called: its id, or its alias: what logs call it (``session_alias``).

    Returns:
        the rows of each view that names sessions. Of a session that is over only ``takeover_history`` may have some.

    Raises:
        SessionUnknown: no view has a session that is called so.
        DatabaseUnavailable, SchemaError: as in ``fetch``.
    """
    views = {view: f'"{checked(schema)}".{view}' for view in COLUMNS if COLUMNS[view][0] == "session_id"}

    async def read() -> dict[str, list[dict[str, object]]]:
        async with _reading(database_url, schema) as connection:
            return {
                view: await _rows(connection, f"select * from {name} where {_CALLED} order by {_ORDER[view]}", called)  # noqa: S608
                for view, name in views.items()
            }

    found = finish(read, database_url, LIMIT_SECONDS)
    if not any(found.values()):
        message = (
            f"No session of schema {schema} has the id or alias {called}, and none that was moved. It is over, or of "
            "another schema (--schema). `pgmcp sessions` lists those that live."
        )
        raise SessionUnknown(message)
    return found


@asynccontextmanager
async def _reading(database_url: str, schema: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(database_url)
    try:
        async with connection.transaction(readonly=True):
            yield connection
    except asyncpg.UndefinedTableError as error:
        message = f"Schema {schema} lacks a public view ({error}). Run `pgmcp db upgrade`, or check --schema."
        raise SchemaError(message) from error
    finally:
        connection.terminate()


async def _rows(connection: asyncpg.Connection, statement: str, *args: object) -> list[dict[str, object]]:
    rows = await connection.fetch(statement, *args, timeout=LIMIT_SECONDS)
    return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: object) -> object:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value
