"""Drain: a node that leaves gives its sessions to the others (G10).

Invariants:
- A session moves when it works on nothing; what still runs at the limit moves too, and its new owner treats that as
  after a death.
- The newest build comes first, then whoever owns the fewest: in a rolling restart sessions do not move from one node
  that leaves to the next.
- In the second half of the limit nothing new begins here: the port is closed, and what sessions are asked waits for
  their next owner. Or a session that always works on something would never be idle, and lose at the limit what it works
  on then. So whatever takes less than half the limit is finished.
- Exchanges that cannot be resumed elsewhere are waited for, up to the limit.

Failure handling: without another ready node nothing is handed over or held back, and the node leaves when it has
finished what it does; whoever joins later takes the sessions over. A node that stops being ready is not given any more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable
from typing import Protocol

from pgmcp.clock import Clock
from pgmcp.errors import PgmcpError
from pgmcp.ports import Takeovers
from pgmcp.trouble import Trouble
from pgmcp.types import Candidate, NodeId, Ownership, SessionKey

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.05
"""Seconds between two looks at what has become idle."""

TOGETHER = 16
"""Sessions that are handed over at the same time."""

LAST_SECONDS = 2.0
"""Seconds for handing over what still works at the limit, or came in late; whatever is left then, others take over."""


class Sessions(Protocol):
    """The sessions of the node that leaves."""

    @property
    def sessions(self) -> int:
        """How many there are."""
        ...

    def hold(self) -> None:
        """Start no more requests: they wait for their session's next owner."""
        ...

    def movable(self, *, busy: bool) -> list[SessionKey]:
        """Those that can be given away now; those that work on something only if ``busy``."""
        ...

    async def hand_over(self, session: SessionKey, to: NodeId, *, busy: bool) -> Ownership | None:
        """Give one away; None when that cannot be done now."""
        ...


class Drain:
    """The drain of one incarnation.

    Args:
        sessions: what is to be given away.
        table: who may be given sessions.
        waiting: how many exchanges of this node cannot be resumed elsewhere.
        wake_new_owner: called with each session that has moved, for its new owner to be woken.
    """

    def __init__(
        self,
        sessions: Sessions,
        table: Takeovers,
        clock: Clock,
        *,
        waiting: Callable[[], int],
        wake_new_owner: Callable[[NodeId, Ownership], None],
    ) -> None:
        self._sessions, self._table, self._clock = sessions, table, clock
        self._waiting, self._wake_new_owner = waiting, wake_new_owner
        self._alone = False
        self._trouble = Trouble("handing sessions over", clock, patience=0)
        self._shut: Callable[[], Awaitable[None]] | None = None

    async def run(self, limit: float, shut: Callable[[], Awaitable[None]]) -> None:
        """Give sessions away until there is none left and no exchange is waited for, or ``limit`` seconds are over.

        Args:
            shut: closes the node's port; called once.
        """
        begun, self._shut = self._clock.boottime(), shut
        await self._give(begun + limit, late=begun + limit / 2)
        if self._sessions.sessions and not self._alone:
            logger.warning("%d sessions still work at the limit and move as they are", self._sessions.sessions)
            await self._tried(self._clock.boottime() + LAST_SECONDS, busy=True)
        await self._close()
        await self._give(self._clock.boottime() + LAST_SECONDS)  # what came in until the port was closed

    async def _give(self, end: float, late: float = math.inf) -> None:
        while (self._sessions.sessions or self._waiting()) and self._clock.boottime() < end:
            await self._tried(end, late=self._clock.boottime() >= late)
            idle = len(self._sessions.movable(busy=False))
            if self._alone and not self._waiting() and idle == self._sessions.sessions:
                return
            await self._clock.sleep(PAUSE_SECONDS)

    async def _close(self) -> None:
        shut, self._shut = self._shut, None
        if shut is not None:
            await shut()

    async def _tried(self, end: float, *, late: bool = False, busy: bool = False) -> None:
        try:
            await self._pass(end, late=late, busy=busy)
            self._trouble.over()
        except PgmcpError as error:
            self._trouble.met(error)

    async def _pass(self, end: float, *, late: bool, busy: bool) -> None:
        movable = self._sessions.movable(busy=busy)
        if not movable and not late:
            return
        owned = {candidate.node: candidate.sessions for candidate in newest(await self._table.ready_nodes())}
        self._alone = not owned
        if late and owned:
            self._sessions.hold()
            await self._close()
        while movable and owned and self._clock.boottime() < end:
            some, movable = movable[:TOGETHER], movable[TOGETHER:]
            await asyncio.gather(*(self._move(session, owned, busy=busy) for session in some))

    async def _move(self, session: SessionKey, owned: dict[NodeId, int], *, busy: bool) -> None:
        if not owned:
            return
        to = min(owned, key=lambda node: owned[node])
        owned[to] += 1
        moved = await self._sessions.hand_over(session, to, busy=busy)
        if moved is not None:
            self._wake_new_owner(to, moved)
        else:
            owned.pop(to, None)  # it may have stopped being ready; the next look tells


def newest(candidates: list[Candidate]) -> list[Candidate]:
    """Those of the newest build."""

    def build(candidate: Candidate) -> list[int]:
        return [int(number) for number in re.findall("[0-9]+", candidate.version)]

    best = max((build(candidate) for candidate in candidates), default=[])
    return [candidate for candidate in candidates if build(candidate) == best]
