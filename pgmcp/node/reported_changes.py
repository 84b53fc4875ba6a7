"""Reported changes: what wake-ups say of sessions is believed when the tables say so too.

PostgreSQL has no rights on channels: whoever may connect to the database can tell a node that a session is over, or its
own now.

Invariants:
- Nothing is dropped, ended or taken on but what the tables say, in a statement that began after the wake-up was heard.
- What is said of sessions of which nothing is here costs nothing. The rest is looked up together, one statement at a
  time, with a pause between two (``OnDemand``).

Failure handling: what cannot be looked up now is looked up later. What is forgotten, because too much is said, is found
by the survey.
"""

from __future__ import annotations

from collections.abc import Iterable

from pgmcp.clock import Clock
from pgmcp.errors import PgmcpError
from pgmcp.ports import Inbox
from pgmcp.service import OnDemand, Service
from pgmcp.session.host import Host
from pgmcp.types import NodeId, Ownership, SessionKey
from pgmcp.web.open_streams import OpenStreams

MOST = 1000
"""Sessions that were said to come here and are looked up together; a drain hands over some dozens at a time."""

RETRY_SECONDS = 0.5
"""Seconds after which what could not be looked up is looked up again."""


class ReportedChanges(Service):
    """What one incarnation was told of sessions, until it has looked.

    Args:
        node: this one.
    """

    def __init__(self, node: NodeId, host: Host, open_streams: OpenStreams, inbox: Inbox, clock: Clock) -> None:
        self._node, self._host, self._open_streams, self._inbox, self._clock = node, host, open_streams, inbox, clock
        self._ended, self._handed = set[SessionKey](), set[Ownership]()
        self._looks = OnDemand(self._look, clock)

    @property
    def wanted(self) -> bool:
        """Whether a look has still to begin."""
        return self._looks.wanted

    def hear(self, *, ended: Iterable[SessionKey] = (), handed: Iterable[Ownership] = ()) -> None:
        """Look these sessions up soon, where something of them is here."""
        self._ended.update(session for session in ended if self._host.has(session) or self._open_streams.has(session))
        for ownership in handed:
            if len(self._handed) < MOST:
                self._handed.add(ownership)
        if self._ended or self._handed:
            self._looks.want()

    async def run(self) -> None:
        """Look whenever something was said, for ever."""
        await self._looks.run()

    async def _look(self) -> None:
        ended, handed = self._ended, self._handed
        self._ended, self._handed = set(), set()
        try:
            owners = await self._inbox.owners([*ended, *(ownership.session for ownership in handed)])
        except PgmcpError:
            self._ended |= ended
            self._handed |= handed
            await self._clock.sleep(RETRY_SECONDS)
            self._looks.want()
            raise
        if self._host.unsettled:
            return  # sessions that are missing may be some that a failover has lost: whoever settles that, finds them
        self.end(session for session in ended if session not in owners)
        for ownership in handed:
            if owners.get(ownership.session) == (self._node, ownership.epoch):
                self._host.take_on(ownership)

    def end(self, sessions: Iterable[SessionKey]) -> None:
        """Drop what is here of sessions that are over."""
        over = frozenset(sessions)
        for session in over:
            self._host.drop(session)
        self._open_streams.end(over)
