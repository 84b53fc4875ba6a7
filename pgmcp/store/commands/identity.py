"""What the cluster of a schema serves: set by its first node, and by an operator while no node is there.

Invariants:
- One row; who joins locks it, so of two first nodes that serve different servers one is refused, and a new name and a
  join are in order (``join`` in ``sql/nodes.sql``).
- A name is all that is compared. Another version, other tools: a rolling upgrade.
- Nodes of builds before revision 0010 do not look.
"""

from __future__ import annotations

import asyncpg

from pgmcp.errors import SchemaError, SchemaInUse, SettingsError
from pgmcp.store.connection.address import place
from pgmcp.store.connection.encoding import encoding_of
from pgmcp.store.connection.one_shot import checked, connect, finish
from pgmcp.store.statements import statement

LIMIT_SECONDS = 10.0  # seconds


def served(database_url: str, schema: str) -> str | None:
    """What the cluster serves; None before its first node.

    Raises:
        DatabaseUnavailable: no answer within ``LIMIT_SECONDS``.
        SchemaError: there are no tables of pgmcp, or older ones.
    """
    row = _asked(database_url, schema, "cluster")
    return None if row is None else row["serves"]


def rename(database_url: str, schema: str, name: str) -> None:
    """Let the cluster serve something else from now on. Its sessions stay: they are the new one's.

    Raises:
        DatabaseUnavailable: no answer within ``LIMIT_SECONDS``.
        SchemaInUse: nodes live there; nothing was changed.
        SchemaError: there are no tables of pgmcp, or older ones.
    """

    async def work() -> str | None:
        connection = await connect(database_url)
        try:
            async with connection.transaction(isolation="read_committed"):
                # Two statements: the second one sees whoever joined before the first had its lock.
                await connection.execute(statement("hold_cluster", checked(schema)))
                living: str | None = await connection.fetchval(
                    statement("rename_cluster", schema), encoding_of(connection).given(name)
                )
                return living
        finally:
            connection.terminate()

    if living := finish(work, database_url, LIMIT_SECONDS):
        message = f"The cluster of schema {schema} has living nodes: {living}. Stop them, then run the command again."
        raise SchemaInUse(message)


def exists(database_url: str, schema: str) -> bool:
    """Whether there is a schema of this name, whoever made it.

    Raises:
        DatabaseUnavailable: no answer within ``LIMIT_SECONDS``.
    """
    return _asked(database_url, schema, "schema_exists", schema) is not None


def note_maker(database_url: str, schema: str, maker: str) -> None:
    """Note which command has just made the schema.

    Raises:
        DatabaseUnavailable: no answer within ``LIMIT_SECONDS``.
    """
    _asked(database_url, schema, "note_maker", maker)


def refuse_foreign(database_url: str, schema: str, maker: str) -> None:
    """Check that a command has made a schema by itself, before it starts nodes there.

    Raises:
        DatabaseUnavailable: no answer within ``LIMIT_SECONDS``.
        SettingsError: somebody else has made it.
    """
    try:
        row = _asked(database_url, schema, "cluster")
    except SchemaError:  # of another make
        row = None
    if row is None or row["made_by"] != maker:
        message = (
            f"Schema {schema} of {place(database_url)} was not made by `pgmcp {maker}`: a cluster may live there. "
            f"Choose another --schema or --database-url (PGMCP_SCHEMA, PGMCP_DATABASE_URL), or join it (`pgmcp serve`)."
        )
        raise SettingsError(message)


def remove(database_url: str, schema: str) -> None:
    """Drop a schema with all that is in it; for whoever made it.

    Raises:
        DatabaseUnavailable: no answer within ``LIMIT_SECONDS``.
    """
    _asked(database_url, schema, "drop_schema")


def _asked(database_url: str, schema: str, name: str, *args: object) -> asyncpg.Record | None:
    async def work() -> asyncpg.Record | None:
        connection = await connect(database_url)
        try:
            return await connection.fetchrow(statement(name, checked(schema)), *args)
        finally:
            connection.terminate()

    return finish(work, database_url, LIMIT_SECONDS)
