"""Lost claims: those that came to nobody, since a try that was given up as lost committed after its repeat."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pgmcp.ports import Inbox
from pgmcp.session.intake import Resident
from pgmcp.types import SessionKey

logger = logging.getLogger(__name__)


async def put_back(inbox: Inbox, residents: Mapping[SessionKey, Resident]) -> list[SessionKey]:
    """Give such claims up; the sessions whose messages wait again.

    Raises:
        DatabaseUnavailable: not now.
    """
    again: list[SessionKey] = []
    for ownership, claims in (await inbox.claimed()).items():
        resident = residents.get(ownership.session)
        if resident is None or resident.taking or resident.actor.ownership != ownership:
            continue
        lost = {key: claim for key, claim in claims.items() if not resident.actor.has(key)}
        if lost:
            logger.warning("session %s: %d claims came to nobody and are given up", resident.actor.alias, len(lost))
            await inbox.put_back(ownership, lost)
            again.append(ownership.session)
    return again
