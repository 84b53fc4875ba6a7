"""Alembic inside pgmcp's schema: where its scripts are, and one guarded run of them.

Alembic keeps its context in module globals, so one thread at a time may be inside (``alone``).
"""

from __future__ import annotations

import functools
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, MetaData, NullPool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from pgmcp.clock import Clock, Ids
from pgmcp.errors import SchemaError
from pgmcp.store.connection.address import place
from pgmcp.store.connection.one_shot import connect
from pgmcp.store.connection.pooler import refuse_transaction_pooler
from pgmcp.store.connection.settings import pin
from pgmcp.store.schema import revisions
from pgmcp.store.schema.tables import metadata

LOCK_WAIT_SECONDS = 60.0  # seconds for another run to end
# Everybody else queues behind a waiting ALTER TABLE: it waits for less time than a renewal may take (1.5 s), but for
# longer than PostgreSQL waits until it sends an autovacuum away (deadlock_timeout, 1 s). Then others have their turn.
TABLE_LOCK_SECONDS = 1.2  # seconds for a lock on a table
PAUSE_SECONDS = 1.0  # seconds between runs, at most
TRIES = 20  # runs in all when a table stays locked
STATEMENT_SECONDS = 600.0  # seconds for any statement

# An administrator's limits for forgotten transactions must not end the one that holds the lock.
_LOCK = """
select set_config(name, '0', true) from pg_catalog.pg_settings
 where name in ('idle_in_transaction_session_timeout', 'statement_timeout', 'transaction_timeout');
set local lock_timeout = {wait};
select pg_advisory_xact_lock({key});
"""

_one_thread = threading.Lock()


@contextmanager
def alone(limit: float) -> Iterator[None]:
    """Keep other threads of this process out of Alembic, and turn its refusals into ours.

    Raises:
        SchemaError: another thread is still inside after ``limit`` seconds, or Alembic refused the command.
    """
    if not _one_thread.acquire(timeout=limit):
        message = f"Another thread of this process has been migrating for {limit:g} s. Run the command again later."
        raise SchemaError(message)
    try:
        yield
    except CommandError as error:
        message = f"{error}. `pgmcp db history` lists the revisions of this build."
        raise SchemaError(message) from error
    finally:
        _one_thread.release()


def config(schema: str, *, revision: str = "head", down: bool = False, connection: Connection | None = None) -> Config:
    """What ``migrations/env.py`` reads."""
    made = Config(stdout=io.StringIO())  # `check` prints its findings: we return them
    made.set_main_option("script_location", str(revisions.folder()).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    made.attributes.update(
        schema=schema,
        metadata=_metadata_in(schema),
        revision=revision,
        down=down,
        connection=connection,
        limits=_limits(),
    )
    return made


def _limits() -> tuple[str, ...]:
    """The limits of a run's connection."""
    return tuple(
        f"set {name} = '{int(seconds * 1000)}ms'"
        for name, seconds in (("lock_timeout", TABLE_LOCK_SECONDS), ("statement_timeout", STATEMENT_SECONDS))
    )


@functools.cache
def scripts() -> ScriptDirectory:
    """The migrations of this build."""
    return ScriptDirectory(str(revisions.folder()))


async def on_own_connection(database_url: str, work: Callable[[Connection], Any]) -> None:
    """Run ``work`` on a fresh connection that waits for a table lock for ``TABLE_LOCK_SECONDS`` at most.

    Raises:
        Exception: as asyncpg raised it, without what SQLAlchemy makes of it.
    """

    async def opened() -> asyncpg.Connection:
        connection = await connect(database_url)
        await pin(connection)  # also its search path: names resolve alike, and reflection qualifies every table
        await connection.execute("; ".join(_limits()))
        return connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=opened, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(work)
    except DBAPIError as error:
        cause = error.orig and error.orig.__cause__
        raise (cause if isinstance(cause, Exception) else asyncpg.InterfaceError(str(error.orig))) from None
    finally:
        await engine.dispose()


async def guarded(database_url: str, schema: str, work: Callable[[Connection], Any]) -> None:
    """Run ``work`` while nobody else migrates this schema; try again when a table stays locked.

    Raises:
        SchemaError: another run did not end within ``LOCK_WAIT_SECONDS``, or the way leads through a transaction
        pooler.
    """
    holder = await connect(database_url)
    try:
        await refuse_transaction_pooler(holder, database_url)
        async with holder.transaction(isolation="read_committed"):
            await _lock(holder, database_url, schema)
            await _tried(database_url, work)
    finally:
        holder.terminate()


async def _lock(holder: asyncpg.Connection, database_url: str, schema: str) -> None:
    digest = hashlib.sha256(f"pgmcp migrations of {schema}".encode()).digest()
    key = int.from_bytes(digest[:8], "big", signed=True)
    try:
        await holder.execute(_LOCK.format(wait=int(LOCK_WAIT_SECONDS * 1000), key=key))
    except asyncpg.LockNotAvailableError as error:
        message = (
            f"Somebody else has been migrating schema {schema} of {place(database_url)} for {LOCK_WAIT_SECONDS:g} s. "
            f"Run the command again when that is done; pg_locks (locktype advisory) shows who it is."
        )
        raise SchemaError(message) from error


async def _tried(database_url: str, work: Callable[[Connection], Any]) -> None:
    for tries_left in reversed(range(TRIES)):
        try:
            return await on_own_connection(database_url, work)
        except asyncpg.LockNotAvailableError:
            if not tries_left:
                raise
        await Clock().sleep(Ids().jitter(PAUSE_SECONDS))
    return None


def _metadata_in(schema: str) -> MetaData:
    """The tables of this build, placed in ``schema``."""
    placed = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(placed, schema=schema)
    return placed
