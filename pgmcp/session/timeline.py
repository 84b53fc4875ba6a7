"""Sessions in a database that has begun to follow another timeline (see ``store.timeline``).

A standby was promoted. It has every commit up to some moment, and none after it. So the last thing that an actor stored
tells of all before: if it is there, nothing of the session is missing, and the actor goes on where it is, with the
numbers of the new term; what it had claimed and works on stays its own. If anything is missing the session is restored
from the tables on its owner, as after a death: what may have run is not run again unless that is harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from pgmcp.errors import DatabaseUnavailable
from pgmcp.ports import Inbox, Log
from pgmcp.session.actor import Actor
from pgmcp.types import Ownership, RequestKey, SessionKey, Stand, StreamId

logger = logging.getLogger(__name__)


async def go_on(
    actors: Sequence[Actor], inbox: Inbox, log: Log, jump: int, lasts: Callable[[], bool]
) -> tuple[list[SessionKey], Mapping[SessionKey, Ownership]]:
    """Let those actors go on that can, and claim anew what they work on.

    Args:
        jump: how far epochs and numbers jumped.
        lasts: whether it is still this timeline.

    Returns:
        the sessions of the other actors, and every session that is this node's.

    Raises:
        DatabaseUnavailable: not now; it may be tried again.
    """
    owned = {ownership.session: ownership for ownership in await inbox.owned()}
    stands = await log.stands([stream for actor in actors for stream in actor.outbox.known()])
    unfinished = await inbox.unfinished([actor.ownership.session for actor in actors])
    stay: list[tuple[Actor, Ownership]] = []
    leaving: list[SessionKey] = []
    for actor in actors:
        ownership = owned.get(actor.ownership.session)
        if ownership == actor.ownership:
            continue  # it was opened in this term
        if ownership is not None and _goes_on(actor, ownership, stands, unfinished, jump):
            stay.append((actor, ownership))
        else:
            logger.warning("session %s: its last moments with the former primary are lost", actor.alias)
            leaving.append(actor.ownership.session)
    if stay:
        working = [key for actor, _ in stay for key in actor.working]
        await inbox.keep_claims([ownership for _, ownership in stay], working)
    if not lasts():
        message = "The primary has changed once more."
        raise DatabaseUnavailable(message)
    for actor, ownership in stay:
        actor.go_on(ownership, stands, jump)
    return leaving, owned


def _goes_on(
    actor: Actor,
    ownership: Ownership,
    stands: Mapping[StreamId, Stand],
    unfinished: Mapping[SessionKey, set[RequestKey]],
    jump: int,
) -> bool:
    if ownership.epoch != actor.ownership.epoch + jump or actor.muted:
        return False
    complete = actor.outbox.complete(stands, jump)
    known = unfinished.get(ownership.session, set())
    working = actor.working - actor.outbox.answered(stands, jump)
    # what it does not work on waits for it, unless it may have been finished in what is missing
    return complete is not False and working <= known and (complete is True or known <= working)
