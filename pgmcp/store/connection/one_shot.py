"""One short-lived connection of a command, apart from any node's pool: bounded, and with errors that say what to do.

Invariants:
- No startup parameters and no statement cache: the connection also opens through a transaction pooler.
- What is raised is a ``PgmcpError`` whose message names the server, never the password.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

import asyncpg

from pgmcp.errors import DatabaseUnavailable, LoginRefused, PgmcpError, SchemaError, SchemaInUse, SettingsError
from pgmcp.store.connection import primary
from pgmcp.store.connection.address import AddressMalformed, AddressUnread, place
from pgmcp.store.connection.encoding import read_unescaped
from pgmcp.store.connection.error_text import REFUSALS

T = TypeVar("T")

CONNECT_SECONDS = 5.0  # seconds
SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,40}")
LOCK_NOT_AVAILABLE = "55P03"
NOT_PERMITTED = "42501"
NODES_IN_THE_WAY = "MCP01"  # raised by migrations/env.py

MALFORMED = "The database URL is malformed. Write it as postgresql://user:password@host:5432/db, %-escaped."

_AWAY = ("08", "57P", "53")  # connection lost, shutting down, out of resources
_REFUSED = ("28", "3D")  # password or role, no such database
GRANTS = "`pgmcp db grants` prints what roles need that run nodes or look at the views."
"""The advice to a role that may not do what a command does."""

OWNER = (
    "Let the role run it that owns the schema and its tables. Where there is no schema yet make one for this role, or "
    "grant this one CREATE on the database."
)
"""The advice to a role that may not migrate."""

_HINTS = {
    "25006": "It is read-only, perhaps a standby: connect to the primary.",
    "2BP01": "Something of yours depends on it: drop that first.",
    "57014": "The statement was cancelled: run the command again.",
    LOCK_NOT_AVAILABLE: "Another transaction holds a lock on the tables: end it (see pg_stat_activity) and run again.",
}


def checked(schema: str) -> str:
    """The schema name, when it is one that can stand in SQL text.

    Raises:
        SettingsError: it is not.
    """
    if SCHEMA_NAME.fullmatch(schema) and not schema.startswith("pg_"):
        return schema
    message = f"Schema name {schema!r} refused: use up to 41 of a-z, 0-9 and _, no digit first, no pg_ prefix."
    raise SettingsError(message)


async def connect(database_url: str) -> asyncpg.Connection:
    """Open a connection within ``CONNECT_SECONDS``.

    Raises:
        SettingsError: the URL is empty or malformed.
        DatabaseUnavailable: nobody answers there.
        LoginRefused: the login is refused.
    """
    if not database_url:
        message = "No database given. Set --database-url or PGMCP_DATABASE_URL to postgresql://user:password@host/db."
        raise SettingsError(message)
    try:
        return await primary.connect(
            database_url, timeout=CONNECT_SECONDS, check=read_unescaped, statement_cache_size=0
        )
    except AddressMalformed:
        raise SettingsError(MALFORMED) from None
    except AddressUnread as error:
        raise SettingsError(f"No database: {error}.") from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
        reason = str(error) or f"no answer within {CONNECT_SECONDS:g} s"
        message = f"{place(database_url)} cannot be used: {reason}. Check that it runs, and the URL's host and login."
        raise (LoginRefused if isinstance(error, REFUSALS) else DatabaseUnavailable)(message) from error


def finish(work: Callable[[], Awaitable[T]], database_url: str, limit: float, *, not_permitted: str = GRANTS) -> T:
    """Run ``work`` to its end from synchronous code, outside any event loop, for at most ``limit`` seconds.

    Args:
        work: what to do.
        database_url: where, for messages.
        limit: seconds.
        not_permitted: the advice when the role lacks a right.

    Raises:
        DatabaseUnavailable: the limit passed, or the connection was lost.
        SchemaError: PostgreSQL refused a statement.
        SchemaInUse: living nodes need what a migration would take away.
    """

    async def bounded() -> T:
        async with asyncio.timeout(limit):
            return await work()

    try:
        return asyncio.run(bounded())
    except TimeoutError as error:
        message = f"{place(database_url)} was not done within {limit:g} s. Check its load and run the command again."
        raise DatabaseUnavailable(message) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise explained(error, database_url, not_permitted) from error


def explained(error: Exception, database_url: str, not_permitted: str = GRANTS) -> PgmcpError:
    """What the error means to whoever ran the command."""
    state = str(getattr(error, "sqlstate", None) or "")
    reason = str(error).partition("\n")[0] or type(error).__name__
    if state.startswith((*_AWAY, *_REFUSED)) or not state:
        return DatabaseUnavailable(f"{place(database_url)} was lost: {reason}. Run the command again when it is back.")
    if state == NODES_IN_THE_WAY:
        hint = "Replace or stop them (SIGTERM, or `pgmcp drain NODE`), then run the command again."
        return SchemaInUse(f"{reason} The steps before it are done. {hint}")
    hints = _HINTS | {NOT_PERMITTED: not_permitted}
    hint = hints.get(state, "Run `pgmcp db check` to see how the schema differs from this build's.")
    return SchemaError(f"{place(database_url)} refused: {reason}. {hint}")
