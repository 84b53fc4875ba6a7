"""Takeover: who died, and which of their sessions this node takes.

Invariants:
- Nobody is declared dead inside an outage: only a node whose own renewals had no break may say so (see ``Lease``).
- A session is taken by whoever needs it (``touch``: a client asked for it here) and by a sweep on every node, for those
  that somebody waits for. There is no leader; the session's row decides who comes first.
- A node that is not trusted, is full, or is not ready (the table looks at that) takes nothing.

Failure handling: a touch that cannot take the session tells every node that there are orphans. What a lost wake-up, or
a race with the death itself, left behind, the next sweep finds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.lease import Lease
from pgmcp.errors import PgmcpError
from pgmcp.ports import Takeovers
from pgmcp.service import PAUSE_SECONDS, Faults, Service, Tasks
from pgmcp.trouble import Trouble
from pgmcp.types import NodeId, Ownership, SessionFacts, SessionKey

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
"""Seconds between two looks for dead nodes."""

SPREAD_SECONDS = 0.1
"""Seconds within which the nodes begin to sweep when one has died, so that each gets some of its sessions."""

TRIES = 3
"""Times that a touch looks: whoever comes second sees the former owner at first."""

SOME = 16
"""Sessions that one sweep statement takes."""

SHARE_SECONDS = 0.05
"""Seconds that a sweep pauses after so many, for other nodes to take theirs."""


class Takeover(Service):
    """One incarnation's part in taking over what others left.

    Args:
        node: who takes.
        table: deaths and changes of owner.
        lease: whether this node may act, and declare others dead.
        room: how many more sessions this node may own.
        tell_orphans: tells every other node that there are orphans.
        wake_owner: tells the owner of a session that it has messages.
        take_on: called with each session that this node has taken.
        sweep_every: seconds between sweeps that nobody asked for.
        faults: counts unexpected errors of a single session.
    """

    def __init__(
        self,
        node: NodeId,
        table: Takeovers,
        lease: Lease,
        clock: Clock,
        ids: Ids,
        *,
        room: Callable[[], int],
        tell_orphans: Callable[[], None],
        wake_owner: Callable[[NodeId, SessionKey], None],
        take_on: Callable[[Ownership], None],
        sweep_every: float,
        faults: Faults,
    ) -> None:
        self._node, self._table, self._lease, self._clock, self._ids = node, table, lease, clock, ids
        self._room, self._tell_orphans, self._wake_owner, self._take_on = room, tell_orphans, wake_owner, take_on
        self._sweep_every = sweep_every
        self._orphans = asyncio.Event()
        self._touched: set[SessionKey] = set()
        self._touches = Trouble("taking over a session that a client asked for", clock)
        self._tasks = Tasks("taking over a session that a client asked for", faults)

    async def run(self) -> None:
        """Look for dead nodes, and take their sessions."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._sweep_for_ever())

    async def _watch(self) -> None:
        """Look for dead nodes, for ever."""
        trouble = Trouble("declaring silent nodes dead", self._clock)
        while True:
            await self._clock.sleep(self._ids.jitter(WATCH_SECONDS))
            try:
                await self._condemn()
                trouble.over()
            except PgmcpError as error:
                trouble.met(error)

    async def _condemn(self) -> None:
        by_lease, by_silence = self._lease.may_condemn()
        if not by_lease and not by_silence:
            return
        dead = await self._table.condemn(by_lease=by_lease, by_silence=by_silence)
        for node in dead:
            why = "its lease ran out" if node.cause == "lease" else "it is silent and its connection is gone"
            logger.warning("node %s (%s) is dead: %s", node.name, node.node, why)
        if dead:
            self._tell_orphans()
            self._orphans.set()

    def orphaned(self) -> None:
        """There are sessions without an owner: sweep soon."""
        self._orphans.set()

    async def _sweep_for_ever(self) -> None:
        """Take orphans that somebody waits for, when told that there are some and every ``sweep_every`` seconds."""
        trouble = Trouble("taking over sessions of dead nodes", self._clock)
        while True:
            if await self._clock.wait(self._orphans, self._ids.jitter(self._sweep_every)):
                self._orphans.clear()
                await self._clock.sleep(self._ids.jitter(SPREAD_SECONDS) - SPREAD_SECONDS / 2)
            try:
                await self.sweep()
                trouble.over()
            except PgmcpError as error:
                trouble.met(error)
            await self._clock.sleep(PAUSE_SECONDS)

    async def sweep(self) -> None:
        """Take orphans that somebody waits for, until there are none or this node is full.

        Raises:
            DatabaseUnavailable: not now.
        """
        while self._lease.trusted and (room := self._room()) > 0:
            taken = await self._table.take_orphans(min(SOME, room))
            for ownership in taken:
                self._take_on(ownership)
            if len(taken) < SOME:
                return
            self._tell_orphans()  # there may be more than one node should have
            await self._clock.sleep(self._ids.jitter(SHARE_SECONDS))

    def touch(self, session: SessionKey) -> None:
        """A client needs this orphan here, now."""
        if session not in self._touched:
            self._touched.add(session)
            self._tasks.spawn(self._take(session)).add_done_callback(lambda _: self._touched.discard(session))

    async def _take(self, session: SessionKey) -> None:
        try:
            for _ in range(TRIES):
                if not self._lease.trusted or self._room() <= 0:
                    break
                facts = await self._table.take(session)
                if facts is None:
                    return
                if not facts.orphaned:
                    self._take_on_or_wake(facts)
                    return
            self._tell_orphans()
        except PgmcpError as error:
            self._touches.met(error)
        else:
            self._touches.over()

    def _take_on_or_wake(self, facts: SessionFacts) -> None:
        if facts.owner == self._node:
            self._take_on(Ownership(facts.session, facts.epoch))
        else:
            self._wake_owner(facts.owner, facts.session)

    async def stop(self) -> None:
        """Take nothing more."""
        await self._tasks.close()
