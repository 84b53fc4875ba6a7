"""Opening sessions, and making room for them where there are too many.

Invariants:
- Nothing that is in use makes room: no session of which anything runs or is carried.
- A caller makes room for itself only: its own session that was used longest ago gives way. Those that have no name are
  one caller for each address. In a full cluster those give way whose client never ended the handshake.

Failure handling: a session that comes into use while it is chosen stays, and another one is chosen. Opening counts
without a lock: what is under way at the same moment may pass a bound, a pool's worth for each node. Far from the bound
all sessions are counted once a second.
"""

from __future__ import annotations

import asyncpg

from pgmcp.errors import ClusterFull, PgmcpError, TooManySessions
from pgmcp.store.database import Database
from pgmcp.store.retention import CLIENT_GONE_SECONDS
from pgmcp.types import NewSession, NodeId, Ownership, Principal, SessionKey

COUNTED_SECONDS = 1.0
"""Seconds for which a count of all sessions holds, where there is much room."""

MUCH = 1_000
"""Places that have to be free for that."""

LOOKS = 10
"""Times that a session's row is looked for when it was neither made nor found."""

CHOICES = 5
"""Times that a session is chosen, if those before came into use just then."""


class SessionOpening:
    """Creates the sessions of one node."""

    def __init__(self, database: Database, node: NodeId) -> None:
        self._database, self._settings, self._node = database, database.settings, node
        self._places, self._counted = 0, float("-inf")

    async def open(self, new: NewSession) -> Ownership:
        """See ``Inbox.open_session``."""
        who, most, most_each = new.principal, self._settings.max_sessions, self._settings.max_sessions_per_caller
        whose, tries = (new.transport, who.client_id, who.issuer, who.subject), 0
        address = _address(who, new.address)

        async def once() -> list[asyncpg.Record]:
            nonlocal tries
            tries += 1  # each spends those before it, which may arrive when the session has ended
            what = (new.session_id, self._node, *whose, new.standalone, bound, most_each, tries, address)
            return await self._database.fetch("open_session", *what)

        for _ in range(LOOKS):
            bound = None if self._have_places() else most
            [row] = await self._database.retry(once, patience=self._settings.hold)
            if row["everybody"] is not None:
                self._places, self._counted = most - row["everybody"], self._database.clock.boottime()
            if row["id"] is not None:
                return Ownership(SessionKey(row["id"]), row["epoch"])
            if row["own"] >= most_each:
                raise self._crowded()
            if row["everybody"] is not None and row["everybody"] >= most:
                raise self._full()
            # else a first try, whose reply was lost, was committing beside this one: the next look sees its row
        message = "The session was neither made nor found; open another one."
        raise PgmcpError(message)

    def _have_places(self) -> bool:
        """Whether there is so much room that nobody has to count; takes a place."""
        self._places -= 1
        return self._places >= MUCH and self._database.clock.boottime() - self._counted < COUNTED_SECONDS

    async def make_room(self, principal: Principal, address: str | None = None) -> list[SessionKey]:
        """See ``Inbox.make_room``."""
        limits, ended, address = self._settings, [], _address(principal, address)
        if principal.client_id is not None or address is not None:
            who = (principal.client_id, principal.issuer, principal.subject)
            of_caller = (*who, limits.max_sessions_per_caller, address)
            ended += await self._end_one("make_room_of_caller", of_caller, self._crowded())
        if not ended:
            ended += await self._end_one("make_room", (limits.max_sessions, CLIENT_GONE_SECONDS), self._full())
        return ended

    async def _end_one(self, name: str, args: tuple[object, ...], none: PgmcpError) -> list[SessionKey]:
        for _ in range(CHOICES):
            row = await self._ask(name, *args)
            if row["ended"] is not None:
                return [SessionKey(row["ended"])]
            if row["room"]:
                return []
            if not row["some"]:
                break
        raise none

    async def _ask(self, name: str, *args: object) -> asyncpg.Record:
        return (await self._database.persist(name, *args, patience=self._settings.hold))[0]

    def _full(self) -> PgmcpError:
        return ClusterFull(f"All {self._settings.max_sessions} sessions of this cluster are in use; try again later.")

    def _crowded(self) -> PgmcpError:
        most = self._settings.max_sessions_per_caller
        return TooManySessions(f"All {most} sessions that you may have are in use; end one before you open another.")


def _address(principal: Principal, address: str | None) -> str | None:
    """The address, where it stands for the caller."""
    return (address or None) if principal.client_id is None else None
