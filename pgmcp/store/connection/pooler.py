"""Finds out whether a transaction pooler stands between a connection and PostgreSQL."""

from __future__ import annotations

import asyncpg

from pgmcp.errors import SchemaError
from pgmcp.store.connection.address import place
from pgmcp.store.connection.one_shot import connect

ROUNDS = 3


async def refuse_transaction_pooler(connection: asyncpg.Connection, database_url: str) -> None:
    """Check that the connection keeps one backend for its whole life.

    A proxy that hands out backends invents the process id of its greeting. Where the id is true there is no such
    proxy; where it is not, a second connection shows whether an idle one loses its backend (transaction pooling).

    Raises:
        SchemaError: it does, so session state and a second connection cannot be relied on.
    """
    if await _backend(connection) == connection.get_server_pid():
        return
    other = await connect(database_url)
    try:
        for _ in range(ROUNDS):
            before = await _backend(connection)
            async with other.transaction():
                taken = await other.fetchval("select pg_backend_pid()")
                after = await _backend(connection)
            if before == taken or after != before:
                message = (
                    f"{place(database_url)} is a transaction pooler. Migrations need a direct connection: "
                    f"run the command again with --database-url set to PostgreSQL itself."
                )
                raise SchemaError(message)
    finally:
        other.terminate()


async def _backend(connection: asyncpg.Connection) -> int:
    async with connection.transaction():  # else a pooler could answer each half of the call from another backend
        return int(await connection.fetchval("select pg_backend_pid()"))
