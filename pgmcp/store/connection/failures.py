"""What can go wrong with the database, by what may be done about it, and how a person is told."""

from __future__ import annotations

import asyncpg

from pgmcp.errors import DatabaseUnavailable, LoginRefused, PgmcpError, SchemaGone, SettingsError
from pgmcp.store.connection.address import place
from pgmcp.store.connection.error_text import REFUSALS, error_text

TROUBLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
"""The database could not be asked, perhaps for want of a login; the same statement may be sent again."""

MISSING = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
)
"""The schema is gone, or is not this build's, or is being restored; the server is there. Waited for like trouble."""

ANSWERED = (*MISSING, asyncpg.InsufficientPrivilegeError)
"""The server is there, and whoever asks it again, in whatever way, is told the same."""

CONTENTION = (
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.UniqueViolationError,
)
"""Another transaction was in the way, or stored the same row; the same statement may be sent again."""


def pooler_error(url: str) -> SettingsError:
    """The error for an address that leads to a pooler, where PostgreSQL itself is needed."""
    return SettingsError(
        f"{place(url)} is a pooler, where LISTEN and the lease do not work. Leave it in --database-url, and set "
        f"--listen-url (PGMCP_LISTEN_URL) to PostgreSQL itself."
    )


def unavailable(url: str, error: BaseException) -> PgmcpError:
    """The error for a database that cannot be used now; it names the place, never the password."""
    if isinstance(error, MISSING):
        return SchemaGone(
            f"{place(url)} has no such tables any more ({error_text(error)}). Restore them, or run `pgmcp db upgrade`."
        )
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return LoginRefused(f"{place(url)} refuses this role ({error_text(error)}).")
    if isinstance(error, REFUSALS):
        return LoginRefused(
            f"{place(url)} refuses the login ({error_text(error)}). Check user, password and database of "
            f"--database-url."
        )
    return DatabaseUnavailable(
        f"{place(url)} does not answer ({error_text(error)}). Check that it runs and that --database-url is right."
    )
