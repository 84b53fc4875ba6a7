"""What each connection pins, whatever role, database and server say: in one place, each with its reason.

Invariants:
- A direct connection is pinned before its first statement (``STARTUP``, ``pin``).
- Nothing is set for a session behind a transaction pooler: it would stay with the backend and reach strangers. What the
  backends lack is looked for, and then each statement has a transaction of its own that sets it (``Frame``).
- ``synchronous_commit`` is lifted from ``off`` only: ``local``, ``remote_write``, ``remote_apply`` are a DBA's choice.
- ``default_transaction_read_only`` is no preference but an order: such a server takes no writes.

Failure handling: where the role may not set what it has to (``session_replication_role``), the connection is refused,
and the message says what mends it.
"""

from __future__ import annotations

import logging

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from pgmcp.clock import Clock
from pgmcp.store.connection.error_text import WillNotDo
from pgmcp.store.statements import statement

logger = logging.getLogger(__name__)

CORRECT = {
    # A fence waits for a lock and reads the row that it finds then; in the other levels it fails instead (ADR 1).
    "default_transaction_isolation": "read committed",
    # Else a crash takes back what was said, and numbers are given out twice. Claims turn it off, each by itself.
    "synchronous_commit": "on",
    # As "replica" it turns off foreign keys: rows stay when the session goes that they hang off.
    "session_replication_role": "origin",
}
"""What correctness assumes. Formats are not in it (``datestyle``, ``bytea_output``, ``standard_conforming_strings``):
values travel in binary, and no literal has a backslash. asyncpg itself asks for UTF-8."""

CALM = {
    # Each call has a deadline of its own, which knows how large it is; grouped writes set a lock_timeout.
    "statement_timeout": "0",
    "lock_timeout": "0",
    # The line and the pool's connections rest between statements.
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    # With "on" a policy that somebody adds hides rows without a word; with "off" the statement fails and says so.
    "row_security": "off",
    # The statements' names are qualified or PostgreSQL's own, and the latter come first.
    "search_path": "pg_catalog, pg_temp",
}
"""What would disturb, and can be left alone where it cannot be set."""

NEWER = {"transaction_timeout": "0"}
"""What PostgreSQL 15 does not know, so that it can be no startup parameter."""

STARTUP = CALM | {"default_transaction_isolation": "read committed"}
"""Startup parameters of a direct connection: in force before the first statement, however short a limit is."""

WAYS = {"enable_indexscan": "on", "enable_bitmapscan": "on", "enable_nestloop": "on"}
"""How a statement finds a few rows among many."""

PLANS = WAYS | {
    # A plan that was made on empty tables stays in the connection's cache: it must be the one for full tables.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    # Before PostgreSQL 18 a scan that cannot be avoided has a price then at which each run is compiled (60 ms).
    "jit": "off",
    # No statement reads enough to be worth the start of another process.
    "max_parallel_workers_per_gather": "0",
}
"""What speed assumes. Startup parameters: a transaction pooler without --listen-url refuses them, and so the node."""

BEHIND = CORRECT | WAYS | {"statement_timeout": "60000", "transaction_timeout": "60000", "lock_timeout": "1000"}
"""What a backend behind a pooler must have; of a limit, how many milliseconds at least."""

LOOK_AGAIN_SECONDS = 30.0
"""Seconds after which a pooler's backends are looked at again."""

_PRIVILEGE = (
    "session_replication_role is 'replica' for this role, which may not change that; foreign keys are off then. "
    "Let a superuser run: alter role … reset session_replication_role (and alter database … likewise)"
)


async def pin(connection: asyncpg.Connection) -> None:
    """Pin a direct connection for its whole life.

    Raises:
        WillNotDo: the role may not set what it has to.
        Exception: whatever asyncpg raises.
    """
    pins = CORRECT | CALM | NEWER
    try:
        await connection.execute(statement("pin", ""), list(pins), list(pins.values()))
    except asyncpg.InsufficientPrivilegeError as error:
        raise WillNotDo(_PRIVILEGE) from error


class Frame:
    """The transaction around each statement behind a pooler whose backends have not what correctness assumes.

    Args:
        clock: the node's time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._again = 0.0
        self._lacking: set[str] = set()

    async def look(self, connection: asyncpg.Connection | PoolConnectionProxy) -> None:
        """Look what the backend behind a connection has. What one lacks is set from then on, whoever answers.

        Raises:
            WillNotDo: the role may not set it.
            Exception: whatever asyncpg raises.
        """
        await connection.execute(_begin({"statement_timeout"}))
        rows = await connection.fetch(statement("unpinned", ""), list(BEHIND), list(BEHIND.values()))
        await connection.execute("commit")
        self._again = self._clock.boottime() + LOOK_AGAIN_SECONDS
        new = {row["name"]: row["setting"] for row in rows if row["name"] not in self._lacking}
        if not new:
            return
        try:
            await connection.execute(f"{_begin(self._lacking | set(new))}; commit")
        except asyncpg.InsufficientPrivilegeError as error:
            raise WillNotDo(_PRIVILEGE) from error
        self._lacking.update(new)
        listed = ", ".join(f"{name} = {value}" for name, value in new.items())
        logger.warning(
            "the pooler's role or database has %s: each statement has a transaction of its own now, three round trips "
            "instead of one. `alter role … set` to PostgreSQL's default mends that",
            listed,
        )

    async def fetch(
        self, connection: PoolConnectionProxy, text: str, args: tuple[object, ...], timeout: float
    ) -> list[asyncpg.Record]:
        """Run a statement, in a transaction of its own if the backends lack something.

        Raises:
            Exception: whatever asyncpg raises.
        """
        if self._clock.boottime() >= self._again:
            await self.look(connection)
        if not self._lacking:
            rows: list[asyncpg.Record] = await connection.fetch(text, *args, timeout=timeout)
            return rows
        await connection.execute(_begin(self._lacking), timeout=timeout)
        try:
            rows = await connection.fetch(text, *args, timeout=timeout)
        except asyncpg.PostgresError:
            await connection.execute("rollback", timeout=timeout)
            raise
        await connection.execute("commit", timeout=timeout)
        return rows


def _begin(names: set[str]) -> str:
    """The transaction's begin, in one round trip; it also rests between its statements."""
    wanted = CORRECT | WAYS | CALM | NEWER
    parts = ["begin isolation level read committed"]
    for name in sorted(names - {"default_transaction_isolation"} | {"idle_in_transaction_session_timeout"}):
        only = " where current_setting('synchronous_commit') = 'off'" if name == "synchronous_commit" else ""
        parts.append(f"select pg_catalog.set_config('{name}', '{wanted[name]}', true){only}")
    return "; ".join(parts)
