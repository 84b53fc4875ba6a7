"""The pool: every call has a deadline, and trouble with the connection is told apart from trouble with the row.

Invariants:
- One statement is one transaction; nothing here takes an advisory lock, or sets anything for a session of a transaction
  pooler. What role and database say does not matter (``store.connection.settings``).
- Large rows are written on connections of their own, a few at a time, with deadlines that grow with their size: whoever
  has small ones does not wait for them.
- A connection on which a call failed is thrown away, never handed to the next caller. One that did not answer in time,
  or takes no writes any more, takes the idle ones with it: each of them would wait for the same server as long.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from pgmcp.clock import Clock, Ids
from pgmcp.errors import DatabaseUnavailable, PgmcpError, RightsMissing, SettingsError
from pgmcp.settings import Settings
from pgmcp.store.connection import primary
from pgmcp.store.connection.address import AddressMalformed, AddressUnread
from pgmcp.store.connection.encoding import Encoding, encoding_of, read_unescaped
from pgmcp.store.connection.error_text import error_text
from pgmcp.store.connection.failures import ANSWERED, CONTENTION, TROUBLE, pooler_error, unavailable
from pgmcp.store.connection.one_shot import MALFORMED
from pgmcp.store.connection.pooler import transaction_pooled
from pgmcp.store.connection.settings import PLANS, STARTUP, Frame, pin
from pgmcp.store.schema.revisions import understood
from pgmcp.store.schema.rights import permitted
from pgmcp.store.statements import LockWait, statement
from pgmcp.store.timeline import Timeline

Result = TypeVar("Result")

LARGE_BYTES = 1024 * 1024
"""Bytes from which a statement's rows are large."""

LARGE_CONNECTIONS = 2
"""Connections for large rows, besides the pool's."""

FLOOR_BYTES_PER_SECOND = 2 * 1024 * 1024
"""Bytes a second that PostgreSQL stores and reads at least, however busy it is."""

BACKOFF_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5)


class _Connection(asyncpg.Connection):
    """A pool connection without a reset query: nothing here leaves anything to reset."""

    def get_reset_query(self) -> str:
        return ""


class Database:
    """The node's connections for everything but the line.

    Args:
        settings: where PostgreSQL is, how many connections, how long a statement may take.
        clock: the node's time.
        ids: names the terms that this node begins.
    """

    def __init__(self, settings: Settings, clock: Clock, ids: Ids | None = None) -> None:
        self.settings, self.clock = settings, clock
        self.timeline = Timeline(settings.schema_name, ids or Ids())
        self._frame, self._encoding = Frame(clock), Encoding("UTF8")
        self._pool: asyncpg.Pool | None = None
        self._turns, self._large_turns = asyncio.Semaphore(settings.pool_size), asyncio.Semaphore(LARGE_CONNECTIONS)
        self._idle: list[PoolConnectionProxy] = []

    async def open(self) -> None:
        """Connect.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached.
            LoginRefused: it refuses the login.
            RightsMissing: the role may not connect, or not begin with what nodes do.
            SettingsError: its address is malformed, in a file that cannot be read, or a pooler's and the only one.
        """
        if self.settings.pooled:
            options: dict[str, Any] = {"connect": self._connect_pooled, "statement_cache_size": 0}
        else:
            named = {"application_name": f"pgmcp {self.settings.node_name}"}
            options = {"connect": self.connect, "server_settings": PLANS | named}
        try:
            self._pool = await asyncpg.create_pool(
                self.settings.database_url,
                min_size=0,  # with a floor asyncpg logs a traceback for each try while the database is away
                max_size=self.settings.pool_size + LARGE_CONNECTIONS,
                timeout=self.settings.statement_timeout,
                connection_class=_Connection,
                **options,
            )
            self._idle.append(await self._connection(self._pool))
        except (*TROUBLE, asyncpg.PostgresError) as error:
            raise self._refusal(self.settings.database_url, error) from error
        await self._refuse_pooler()

    async def _refuse_pooler(self) -> None:
        """See to it that the line will not go through a transaction pooler: it would hear nothing there."""
        url = self.settings.line_url
        try:
            async with asyncio.timeout(self.settings.statement_timeout):
                if not self.settings.pooled:
                    pooled = await transaction_pooled(self._idle[-1], url)
                else:
                    line = await self.connect(url, timeout=self.settings.statement_timeout, statement_cache_size=0)
                    try:
                        pooled = await transaction_pooled(line, url)
                    finally:
                        line.terminate()
        except (*TROUBLE, asyncpg.PostgresError) as error:
            raise self._refusal(url, error) from error
        if pooled:
            raise pooler_error(url)

    def _refusal(self, url: str, error: BaseException) -> PgmcpError:
        """Why the node cannot start; what only poolers say is said as such."""
        if isinstance(error, AddressUnread):
            return SettingsError(MALFORMED if isinstance(error, AddressMalformed) else f"No database: {error}.")
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            return RightsMissing(str(unavailable(url, error)))
        lost = isinstance(error, (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError))
        startup = isinstance(error, asyncpg.ProtocolViolationError) and "startup parameter" in str(error)
        return pooler_error(url) if startup or (lost and url == self.settings.line_url) else unavailable(url, error)

    async def connect(self, url: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
        """A direct connection to the server that this node works with: see ``primary.connect`` and ``Timeline``."""

        async def check(connection: asyncpg.Connection) -> None:
            await pin(connection)
            await self._speak(connection)
            await self.timeline.follow(connection)

        options["server_settings"] = STARTUP | options.get("server_settings", {})
        return await primary.connect(url, timeout=timeout, check=check, **options)

    async def _connect_pooled(self, url: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
        """The same through a pooler."""

        async def check(connection: asyncpg.Connection) -> None:
            await self._frame.look(connection)
            await self._speak(connection)
            await self.timeline.follow(connection)

        return await primary.connect(url, timeout=timeout, check=check, **options)

    async def _speak(self, connection: asyncpg.Connection) -> None:
        self._encoding = encoding_of(connection)
        await read_unescaped(connection)

    async def close(self) -> None:
        """Close every connection, without waiting for the other side longer than a statement may take."""
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(self.settings.statement_timeout):
                while self._idle:
                    await self._pool.release(self._idle.pop())
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()
        self._pool = None

    async def revision(self) -> str:
        """The schema's revision, with which this build and this role can work.

        Raises:
            DatabaseUnavailable: PostgreSQL does not answer.
            RightsMissing: the role may not do what nodes do.
            SchemaError: it cannot; the message says what to run.
        """
        if self._pool is None:
            raise unavailable(self.settings.database_url, ConnectionError("not connected"))
        try:
            limit = self.settings.statement_timeout
            async with self._turn(self._turns, limit), asyncio.timeout(limit):
                connection = await self._connection(self._pool)
                try:
                    await permitted(connection, self.settings.schema_name)
                    found = await understood(connection, self.settings.schema_name)
                except BaseException:
                    await self._throw_away(self._pool, connection)
                    raise
                self._idle.append(connection)
                return found
        except (*TROUBLE, asyncpg.PostgresError) as error:
            raise unavailable(self.settings.database_url, error) from error

    async def fetch(self, name: str, *args: object, lock_wait: LockWait = LockWait.USUAL) -> list[asyncpg.Record]:
        """Run a named statement once.

        Args:
            lock_wait: how long it waits for each lock, if it is a grouped write.

        Raises:
            DatabaseUnavailable: the pool is closed.
            Exception: whatever asyncpg raises; see ``TROUBLE`` and ``CONTENTION``.
        """
        return await self._fetch(name, args, self._turns, self.settings.statement_timeout, lock_wait)

    async def fetch_sized(
        self, name: str, *args: object, size: int, lock_wait: LockWait = LockWait.USUAL
    ) -> list[asyncpg.Record]:
        """Run a named statement once, as befits the size of its rows.

        Args:
            size: their bytes; large ones have connections of their own, and more time.
            lock_wait: as in ``fetch``.

        Raises:
            Exception: as in ``fetch``.
        """
        if size <= LARGE_BYTES:
            return await self.fetch(name, *args, lock_wait=lock_wait)
        seconds = self.settings.statement_timeout + extra(size)
        return await self._fetch(name, args, self._large_turns, seconds, lock_wait)

    async def _fetch(
        self, name: str, args: tuple[object, ...], turns: asyncio.Semaphore, seconds: float, lock_wait: LockWait
    ) -> list[asyncpg.Record]:
        pool = self._pool
        if pool is None:
            message = "This node's database connections are closed; start the node again."
            raise DatabaseUnavailable(message)
        term = self.timeline.known
        async with self._turn(turns, seconds):
            connection = await self._connection(pool)
            if term is not None and term != self.timeline.known:
                self._idle.append(connection)
                message = "the database follows another timeline than when this was begun"
                raise ConnectionError(message)
            text = statement(name, self.settings.schema_name, lock_wait)
            rows: list[asyncpg.Record] = []
            try:
                rows = await self._run(connection, text, args, seconds)
            except (*TROUBLE, asyncio.CancelledError) as error:
                await self._throw_away(pool, connection)
                while isinstance(error, (TimeoutError, asyncpg.ReadOnlySQLTransactionError)) and self._idle:
                    await self._throw_away(pool, self._idle.pop())
                raise
            except BaseException:
                self._idle.append(connection)  # whatever it was, it must not cost the pool a connection
                raise
            self._idle.append(connection)
        return rows

    async def _run(
        self, connection: PoolConnectionProxy, text: str, args: tuple[object, ...], seconds: float
    ) -> list[asyncpg.Record]:
        if not self._encoding.whole:
            args = tuple(self._encoding.given(each) for each in args)
        if self.settings.pooled:
            return await self._frame.fetch(connection, text, args, seconds)
        rows: list[asyncpg.Record] = await connection.fetch(text, *args, timeout=seconds)
        return rows

    async def _throw_away(self, pool: asyncpg.Pool, connection: PoolConnectionProxy) -> None:
        connection.terminate()
        await pool.release(connection)

    @asynccontextmanager
    async def _turn(self, turns: asyncio.Semaphore, seconds: float) -> AsyncIterator[None]:
        """Wait until one of the connections is free."""
        if turns.locked():
            async with asyncio.timeout(seconds):
                await turns.acquire()
        else:
            await turns.acquire()
        try:
            yield
        finally:
            turns.release()

    async def _connection(self, pool: asyncpg.Pool) -> PoolConnectionProxy:
        """The connection that was used last, or one from the pool, which costs more than a small statement does."""
        while self._idle:
            connection = self._idle.pop()
            with contextlib.suppress(asyncpg.InterfaceError):  # the pool has buried it
                if not connection.is_closed():
                    return connection
                await pool.release(connection)
        async with asyncio.timeout(self.settings.statement_timeout):
            return await pool.acquire()

    async def ask(self, name: str, *args: object) -> list[asyncpg.Record]:
        """Run a named statement once, for those who come back later anyway.

        Raises:
            DatabaseUnavailable: it did not get through this time.
        """
        try:
            return await self.fetch(name, *args)
        except (*TROUBLE, asyncpg.PostgresError) as error:
            raise unavailable(self.settings.database_url, error) from error

    async def persist(
        self, name: str, *args: object, patience: float, gate: Callable[[], Awaitable[None]] | None = None
    ) -> list[asyncpg.Record]:
        """Run a repeatable statement until it gets through or ``patience`` seconds are over.

        Args:
            gate: awaited before each try; an owner waits here for trust.

        Raises:
            DatabaseUnavailable: the patience is over.
        """

        async def once() -> list[asyncpg.Record]:
            if gate is not None:
                await gate()
            return await self.fetch(name, *args)

        return await self.retry(once, patience=patience)

    async def retry(self, call: Callable[[], Awaitable[Result]], *, patience: float) -> Result:
        """Call until there is neither trouble nor contention, or ``patience`` seconds are over.

        Raises:
            DatabaseUnavailable: the patience is over.
            PgmcpError: PostgreSQL refuses it, and would again.
        """
        end, tries = self.clock.boottime() + patience, 0
        while True:
            try:
                async with asyncio.timeout(max(0.0, end - self.clock.boottime())):
                    return await call()
            except (*TROUBLE, *CONTENTION, *ANSWERED) as error:
                if self.clock.boottime() >= end:
                    raise unavailable(self.settings.database_url, error) from error
            except asyncpg.PostgresError as error:
                message = f"PostgreSQL refused a statement: {error_text(error)}"
                raise PgmcpError(message) from error
            await self.clock.sleep(BACKOFF_SECONDS[min(tries, len(BACKOFF_SECONDS) - 1)])
            tries += 1


def extra(size: int) -> float:
    """Seconds that rows of so many bytes take at most, besides what any statement does."""
    return size / FLOOR_BYTES_PER_SECOND if size > LARGE_BYTES else 0.0
