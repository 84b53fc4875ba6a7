"""The end of a session whose server has ended it: however long the database is away, its client is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.ports import Inbox
from pgmcp.types import Ownership, SessionKey

logger = logging.getLogger(__name__)


async def end_session(
    ownership: Ownership, alias: str, inbox: Inbox, clock: Clock, again: float, tell_ended: Callable[[SessionKey], None]
) -> None:
    """End a session for its client too, unless it goes on elsewhere.

    Args:
        alias: what the log calls it.
        again: seconds after which an end that could not be stored is tried again.
        tell_ended: called with the session when it has ended.
    """
    while True:
        try:
            await inbox.end_owned(ownership)
        except DatabaseUnavailable as error:
            logger.debug("session %s is ended when PostgreSQL is back: %s", alias, error)
            await clock.sleep(again)
        except PgmcpError as error:
            logger.info("session %s was not ended here: %s", alias, error)
            return
        else:
            tell_ended(ownership.session)
            return
