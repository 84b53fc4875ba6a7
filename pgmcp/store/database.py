"""The pool: every call has a deadline, and trouble with the connection is told apart from trouble with the row.

Invariants:
- One statement is one transaction; nothing here opens a transaction, takes an advisory lock or sets a session
  variable, so a transaction pooler in between changes nothing.
- A connection on which a call failed is thrown away, never handed to the next caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.settings import Settings
from pgmcp.store.direct import place
from pgmcp.store.migrations import understood
from pgmcp.store.statements import statement

Result = TypeVar("Result")

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
)
"""The database could not be asked; the same statement may be sent again."""

CONTENTION = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
"""The database was asked, and another transaction was in the way; the same statement may be sent again."""

BACKOFF = (0.02, 0.05, 0.1, 0.2, 0.5)


class _Connection(asyncpg.Connection):
    """A pool connection without a reset query: nothing here leaves anything to reset."""

    def get_reset_query(self) -> str:
        return ""


class Database:
    """The node's connections for everything but the line.

    Args:
        settings: where PostgreSQL is, how many connections, how long a statement may take.
        clock: the node's time.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.settings, self.clock = settings, clock
        self._pool: asyncpg.Pool | None = None

    async def open(self) -> None:
        """Connect.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached or refuses the login.
        """
        options: dict[str, Any] = {"statement_cache_size": 0} if self.settings.pooled else {}
        if not self.settings.pooled:
            options["server_settings"] = {"application_name": f"pgmcp {self.settings.node_name}"}
        try:
            self._pool = await asyncpg.create_pool(
                self.settings.database_url,
                min_size=2,
                max_size=self.settings.pool_size,
                timeout=self.settings.statement_timeout,
                connection_class=_Connection,
                **options,
            )
        except (*TROUBLE, asyncpg.PostgresError, ValueError) as error:
            raise unavailable(self.settings.database_url, error) from error

    async def close(self) -> None:
        """Close every connection, without waiting for the other side longer than a statement may take."""
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(self.settings.statement_timeout):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()
        self._pool = None

    async def revision(self) -> str:
        """The schema's revision, which is the one that this build understands.

        Raises:
            DatabaseUnavailable: PostgreSQL does not answer.
            SchemaError: it is another one; the message says what to run.
        """
        if self._pool is None:
            raise unavailable(self.settings.database_url, ConnectionError("not connected"))
        try:
            async with asyncio.timeout(self.settings.statement_timeout), self._pool.acquire() as connection:
                return await understood(connection, self.settings.schema_name)
        except TROUBLE as error:
            raise unavailable(self.settings.database_url, error) from error

    async def fetch(self, name: str, *args: object) -> list[asyncpg.Record]:
        """Run a named statement once.

        Raises:
            DatabaseUnavailable: the pool is closed.
            Exception: whatever asyncpg raises; see ``TROUBLE`` and ``CONTENTION``.
        """
        pool = self._pool
        if pool is None:
            message = "This node's database connections are closed; start the node again."
            raise DatabaseUnavailable(message)
        seconds = self.settings.statement_timeout
        async with asyncio.timeout(seconds):
            connection = await pool.acquire()
        try:
            rows: list[asyncpg.Record] = await connection.fetch(
                statement(name, self.settings.schema_name), *args, timeout=seconds
            )
        except (*TROUBLE, asyncio.CancelledError):
            connection.terminate()
            raise
        finally:
            await pool.release(connection)
        return rows

    async def ask(self, name: str, *args: object) -> list[asyncpg.Record]:
        """Run a named statement once, for those who come back later anyway.

        Raises:
            DatabaseUnavailable: it did not get through this time.
        """
        try:
            return await self.fetch(name, *args)
        except (*TROUBLE, *CONTENTION) as error:
            raise unavailable(self.settings.database_url, error) from error

    async def persist(self, name: str, *args: object, patience: float) -> list[asyncpg.Record]:
        """Run a repeatable statement until it gets through or ``patience`` seconds are over.

        Raises:
            DatabaseUnavailable: the patience is over.
        """
        return await self.retry(lambda: self.fetch(name, *args), patience=patience)

    async def retry(self, call: Callable[[], Awaitable[Result]], *, patience: float) -> Result:
        """Call until there is neither trouble nor contention, or ``patience`` seconds are over.

        Raises:
            DatabaseUnavailable: the patience is over.
        """
        end, tries = self.clock.boottime() + patience, 0
        while True:
            try:
                return await call()
            except (*TROUBLE, *CONTENTION) as error:
                if self.clock.boottime() >= end:
                    raise unavailable(self.settings.database_url, error) from error
            await self.clock.sleep(BACKOFF[min(tries, len(BACKOFF) - 1)])
            tries += 1


def unavailable(url: str, error: BaseException) -> PgmcpError:
    """The error for a database that cannot be used now; it names the place, never the password."""
    return DatabaseUnavailable(
        f"{place(url)} does not answer ({type(error).__name__}: {error}). "
        "Check that it runs and that --database-url is right."
    )
