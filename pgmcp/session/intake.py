"""Intake: messages from the inbox to the actors of one host.

Invariants:
- Messages reach an actor only through the claim statement, in inbox order, one claim of a session at a time (a message
  that took a short cut in memory overtook an earlier, acknowledged one in 199 of 300 tries).
- Trust is asked for right before a message is handed over (G9).
- A message is rejected only when it cannot be opened: with another key, or damaged. A key that cannot be read now is
  waited for, and what comes behind the message waits with it: what was acknowledged is not dropped.

Failure handling: a claim that the fence refuses means that the ownership is over, one that fails in another way that
the actor may have lost step with the tables; the host decides what becomes of the session.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, Fenced, PgmcpError, told, unknown
from pgmcp.ports import Inbox
from pgmcp.secret_box import SecretBox
from pgmcp.service import Tasks
from pgmcp.session.actor import Actor
from pgmcp.session.request_context import RequestContext, place_of_context
from pgmcp.session.running_requests import ActorEnd
from pgmcp.types import Claimed, SessionKey

logger = logging.getLogger(__name__)

QUIET_SECONDS = 60.0
"""Seconds for which no other session is said to wait."""

RETRY_SECONDS = 1.0
"""Seconds after which a key that could not be read is asked for again."""


@dataclass(slots=True)
class Resident:
    """An actor on its host: whether its inbox has to be looked at, and whether that is done."""

    actor: Actor
    dirty: bool = False
    taking: bool = False


class Intake:
    """Claims and delivers the messages of one host's sessions.

    Args:
        residents: the host's sessions.
        box: opens the callers' identities.
        trusted: returns when the node may act, raises ``Fenced``.
        tasks: where claims run.
        on_fenced: called with a session whose ownership is over.
        on_over: called with an actor that has come to an end otherwise.
    """

    def __init__(
        self,
        residents: Mapping[SessionKey, Resident],
        *,
        inbox: Inbox,
        box: SecretBox,
        clock: Clock,
        trusted: Callable[[], Awaitable[None]],
        tasks: Tasks,
        on_fenced: Callable[[SessionKey], None],
        on_over: Callable[[Actor, ActorEnd], None],
    ) -> None:
        self._residents, self._inbox, self._box = residents, inbox, box
        self._clock, self._trusted, self._tasks = clock, trusted, tasks
        self._on_fenced, self._on_over = on_fenced, on_over
        self._holding = False
        self._quiet_until = 0.0

    def hold(self) -> None:
        """Claim no more requests; what serves running ones still comes in."""
        self._holding = True

    def wake(self, resident: Resident) -> None:
        """A session's inbox may have messages: claim them, once more if that is being done."""
        resident.dirty = True
        if not resident.taking:
            resident.taking = True
            self._tasks.spawn(self._take(resident))

    async def _take(self, resident: Resident) -> None:
        session = resident.actor.ownership.session
        try:
            while resident.dirty and self._residents.get(session) is resident:
                resident.dirty = False
                ownership = resident.actor.ownership
                try:
                    claimed_now = await self._inbox.claim(ownership, requests=not self._holding)
                except Fenced:
                    if resident.actor.ownership == ownership:
                        raise
                    resident.dirty = True  # the term has changed
                    continue
                messages = [message for message in claimed_now if not resident.actor.has(message.key)]
                resident.actor.expect(messages)
                for claimed in messages:
                    await self.deliver(resident.actor, claimed)
        except Fenced:
            if self._residents.get(session) is resident:  # else another one has its place already
                self._on_fenced(session)
        except DatabaseUnavailable as error:
            self._say_waits(resident.actor, error)
        except Exception as error:
            logger.warning(
                "session %s lost step and is restored from the tables: %s",
                resident.actor.alias,
                told(error),
                exc_info=unknown(error),
            )
            resident.actor.mute()
            self._on_over(resident.actor, ActorEnd.OUT_OF_STEP)
        finally:
            resident.taking = False

    def _say_waits(self, actor: Actor, error: DatabaseUnavailable) -> None:
        """Say so of one session in a while: in an outage it is all of them."""
        now = self._clock.boottime()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            logger.warning("session %s, and maybe others, waits for its messages: %s", actor.alias, error)

    async def deliver(self, actor: Actor, claimed: Claimed) -> None:
        """Hand a claimed and expected message to its actor.

        Raises:
            Fenced: the ownership, or the node's right to act, is over.
        """
        try:
            packed = await self._opened(actor, claimed)
        except PgmcpError as error:
            logger.error("session %s: a message cannot be opened, and its call ends: %s", actor.alias, error)
            await actor.reject(claimed, str(error))
            return
        await self._trusted()  # last: opening may ask the database for a new key
        if packed is not None:
            await actor.deliver(claimed, RequestContext.unpack(packed))

    async def _opened(self, actor: Actor, claimed: Claimed) -> bytes | None:
        """The context as the edge sealed it; None when the actor was muted meanwhile."""
        while not actor.muted:
            try:
                return await self._box.open(claimed.context, place_of_context(actor.session_id, claimed.key))
            except DatabaseUnavailable as error:
                self._say_waits(actor, error)
            await self._clock.sleep(RETRY_SECONDS)
        return None
