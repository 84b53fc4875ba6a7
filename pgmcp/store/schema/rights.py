"""Whether the role of a node may do what nodes do; who may not is told how to get all of it, not one error each."""

from __future__ import annotations

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from pgmcp.errors import RightsMissing
from pgmcp.store.connection.one_shot import checked
from pgmcp.store.schema.revisions import LOOK_SECONDS, VERSION_TABLE
from pgmcp.store.statements import statement

WRITTEN = (
    "cluster", "events", "history", "journal", "node_states", "nodes", "publications", "requests", "schema_range",
    "secrets", "sessions", "spent_states", "streams", "takeovers",
)  # fmt: skip
"""Tables of whose rows nodes do anything: all but Alembic's own, which they read."""

CALLED = ("in_use",)
"""Functions that their statements call."""

SHOWN = 3
"""Rights that a message names; where one is missing, it is mostly all of them."""


async def lacking(connection: asyncpg.Connection | PoolConnectionProxy, schema: str) -> tuple[str, list[str]] | None:
    """The connection's role and what it may not do of what nodes do; None when that is nothing.

    Raises:
        TimeoutError: no answer within ``LOOK_SECONDS``.
    """
    asked = statement("lacking_rights", checked(schema))
    row = await connection.fetchrow(asked, WRITTEN, (VERSION_TABLE,), CALLED, timeout=LOOK_SECONDS)
    return None if row is None else (row["role"], row["what"])


async def permitted(connection: asyncpg.Connection | PoolConnectionProxy, schema: str) -> None:
    """See that the connection's role may do what nodes do.

    Raises:
        RightsMissing: it may not.
        TimeoutError: no answer within ``LOOK_SECONDS``.
    """
    if (found := await lacking(connection, schema)) is None:
        return
    role, what = found
    more = f", and {len(what) - SHOWN} more" if len(what) > SHOWN else ""
    message = (
        f"Role {role} may not work with schema {schema}: it lacks {'; '.join(what[:SHOWN])}{more}. Run the SQL that "
        f"`pgmcp db grants --runtime {role} --schema {schema}` prints, as the role that migrates."
    )
    raise RightsMissing(message)
