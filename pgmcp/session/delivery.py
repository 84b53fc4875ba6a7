"""Delivery: one claimed message from the inbox to its session's actor.

Invariants:
- Trust is asked for right before a message is handed over (G9).
- A message is rejected only when it cannot be opened: with another key, or damaged. A key that cannot be read now is
  waited for, and what comes behind the message waits with it: what was acknowledged is not dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from pgmcp.boxes import SecretBox
from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.session.actor import Actor
from pgmcp.session.request_context import RequestContext, place_of_context
from pgmcp.types import Claimed

logger = logging.getLogger(__name__)

AGAIN = 1.0
"""Seconds after which a key that could not be read is asked for again."""


class Delivery:
    """Delivers the messages of one host.

    Args:
        box: opens the callers' identities.
        trusted: returns when the node may act, raises ``Fenced``.
    """

    def __init__(self, box: SecretBox, clock: Clock, trusted: Callable[[], Awaitable[None]]) -> None:
        self._box, self._clock, self._trusted = box, clock, trusted

    async def deliver(self, actor: Actor, claimed: Claimed) -> None:
        """Hand a claimed and expected message to its actor.

        Raises:
            Fenced: the ownership, or the node's right to act, is over.
        """
        try:
            packed = await self._opened(actor, claimed)
        except PgmcpError as error:
            logger.error("session %s: %s", claimed.ownership.session, error)
            await actor.reject(claimed, str(error))
            return
        await self._trusted()  # last: opening may ask the database for a new key
        if packed is not None:
            await actor.deliver(claimed, RequestContext.unpack(packed))

    async def _opened(self, actor: Actor, claimed: Claimed) -> bytes | None:
        """The caller as the edge sealed it; None when the actor was muted meanwhile."""
        while not actor.muted:
            try:
                return await self._box.open(claimed.context, place_of_context(actor.session_id, claimed.key))
            except DatabaseUnavailable as error:
                logger.info("session %s waits for a key: %s", claimed.ownership.session, error)
            await self._clock.sleep(AGAIN)
        return None
