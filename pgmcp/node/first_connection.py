"""The first connection of a node to its database, which may be away while the node starts.

Failure handling: a database that is away is waited for, for a limited time; the log says so once, and why. What waiting
does not mend (a login that is refused, a schema that does not fit) ends the start at once, and so does a signal.
"""

from __future__ import annotations

import asyncio
import logging

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, LoginRefused
from pgmcp.node.signals import Signals
from pgmcp.store.database import Database

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.5
"""Seconds between two tries."""


async def connect(database: Database, clock: Clock, seconds: float) -> str:
    """Open the database; the schema's revision.

    Args:
        seconds: for how long one that is away is waited for.

    Raises:
        DatabaseUnavailable: it was away for so long, or a signal came.
        LoginRefused: it lets this node not in.
        SchemaError: the schema is not one that this build understands.
        SettingsError: it is a pooler, or its address cannot be read.
    """
    began, waiting, stopped = clock.boottime(), False, asyncio.Event()

    async def stop() -> None:
        stopped.set()

    with Signals(stop, stopped.set):
        while isinstance(found := await _opened(database), DatabaseUnavailable):
            left = began + seconds - clock.boottime()
            if left <= 0:
                raise _given_up(found, seconds) from found
            if not waiting:
                waiting = True
                logger.warning("%s This node waits for it, %g s at most (--wait).", found, seconds)
            if await clock.wait(stopped, min(left, PAUSE_SECONDS)):
                break
    if stopped.is_set() or isinstance(found, DatabaseUnavailable):  # also while it connected: nothing is begun any more
        message = "This node was told to stop while it waited for the database."
        raise DatabaseUnavailable(message)
    if waiting:
        logger.warning("the database answers after %.1f s: this node starts", clock.boottime() - began)
    return found


async def _opened(database: Database) -> str | DatabaseUnavailable:
    """The schema's revision; or why the database is away, which may pass."""
    try:
        await database.open()
        return await database.revision()
    except LoginRefused:
        raise
    except DatabaseUnavailable as error:
        await database.close()
        return error


def _given_up(error: DatabaseUnavailable, seconds: float) -> DatabaseUnavailable:
    """The last error, of its own kind: tables that are not there are not a database that is away."""
    waited = f" This node has waited {seconds:g} s for it (--wait)." if seconds else ""
    return type(error)(f"{error}{waited}")
