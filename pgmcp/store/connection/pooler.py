"""Finds out whether a transaction pooler stands between a connection and PostgreSQL."""

from __future__ import annotations

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from pgmcp.errors import SchemaError
from pgmcp.store.connection.address import place
from pgmcp.store.connection.one_shot import connect

ROUNDS = 3


async def refuse_transaction_pooler(connection: asyncpg.Connection, database_url: str) -> None:
    """Check that the connection keeps one backend for its whole life, as migrations need it.

    Raises:
        SchemaError: it does not, so session state and a second connection cannot be relied on.
    """
    if await transaction_pooled(connection, database_url):
        message = (
            f"{place(database_url)} is a transaction pooler. Migrations need a direct connection: "
            f"run the command again with --database-url set to PostgreSQL itself."
        )
        raise SchemaError(message)


async def transaction_pooled(connection: asyncpg.Connection | PoolConnectionProxy, database_url: str) -> bool:
    """Whether a connection's backend changes between its transactions.

    A proxy that hands out backends invents the process id of its greeting. Where the id is true there is no such
    proxy; where it is not, a second connection shows whether an idle one loses its backend (transaction pooling).

    Raises:
        DatabaseUnavailable: there is no second connection.
        Exception: whatever asyncpg raises.
    """
    if await _backend(connection) == connection.get_server_pid():
        return False
    other = await connect(database_url)
    try:
        for _ in range(ROUNDS):
            before = await _backend(connection)
            async with other.transaction():
                taken = await other.fetchval("select pg_backend_pid()")
                after = await _backend(connection)
            if before == taken or after != before:
                return True
        return False
    finally:
        other.terminate()


async def _backend(connection: asyncpg.Connection | PoolConnectionProxy) -> int:
    async with connection.transaction():  # else a pooler could answer each half of the call from another backend
        return int(await connection.fetchval("select pg_backend_pid()"))
