"""The way of one node's statements to the database in memory, and what can happen to them there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Hashable
from typing import TypeVar

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.types import NodeId
from tests.harness.memory.tables import MemoryCluster
from tests.harness.proxy import Cut

Result = TypeVar("Result")

UNFLUSHED = {
    "claim",
    "carried_streams",
    "claimed_requests",
    "find_session",
    "inherited_requests",
    "key_ring",
    "knows_stream",
    "listen",
    "notify",
    "owned",
    "owners",
    "own_state",
    "read_publications",
    "read_streams",
    "ready_nodes",
    "release",
    "restores_begun",
    "sink_epoch",
    "sink_of",
    "stands",
    "unclaimed",
    "unfinished",
}
"""Statements that bring nothing to the disk: reads, and those for whose commits nobody waits."""

BACKOFF = (0.05, 0.1, 0.2, 0.5)


class Lost(Exception):
    """No reply came; the statement may have been committed or not."""


async def _open() -> None:
    return None


def _nothing() -> None:
    return None


class MemoryTimeline:
    """The timeline that a node's connections follow (see ``store.timeline``)."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._cluster = cluster
        self.primary, self.term = cluster.primary, cluster.term
        self.on_change: Callable[[], None] = _nothing

    @property
    def over(self) -> bool:
        """Whether its connections are gone, since another server is the primary."""
        return self.primary != self._cluster.primary

    def follow(self) -> None:
        """A new connection finds the server that is the primary now."""
        if self.over:
            self.primary, self.term = self._cluster.primary, self._cluster.term
            self.on_change()


class Wire:
    """One node's connections.

    Args:
        timeline: what they follow.
        clock: the node's own time.
        running: returns when the node's process runs; a frozen one neither sends nor hears.
        gate: awaited before each write of an owner.
    """

    def __init__(
        self,
        cluster: MemoryCluster,
        node: NodeId,
        clock: Clock,
        timeline: MemoryTimeline,
        *,
        running: Callable[[], Awaitable[None]] = _open,
        gate: Callable[[], Awaitable[None]] = _open,
    ) -> None:
        self.cluster, self.node, self.clock, self.timeline = cluster, node, clock, timeline
        self.gate, self._running = gate, running
        self.is_cut = False
        """Whether the node cannot reach the database, though others can."""
        self.takes: dict[str, float] = {}
        """Seconds that statements take."""
        self._cuts: list[tuple[str, Cut]] = []
        self._late: list[tuple[str, float]] = []
        self._events: list[tuple[str, tuple[Cut, Callable[[], None]]]] = []
        self._ghosts: set[asyncio.Task[None]] = set()
        self._turns: dict[tuple[str, Hashable], asyncio.Lock] = {}

    def cut(self, statement: str, where: Cut) -> None:
        """Break the connection that next executes this statement."""
        self._cuts.append((statement, where))

    def delay(self, statement: str, seconds: float) -> None:
        """The next statement of this name is given up by its node, and committed that much later all the same."""
        self._late.append((statement, seconds))

    def during(self, statement: str, where: Cut, happens: Callable[[], None]) -> None:
        """Something happens in the middle of the next statement of this name: before it arrives, or is heard of."""
        self._events.append((statement, (where, happens)))

    def clear(self) -> None:
        """Good weather again."""
        self.is_cut = False
        self._cuts.clear()
        self._late.clear()
        self._events.clear()

    async def once(self, name: str, work: Callable[[], Result]) -> Result:
        """Run a statement once.

        Raises:
            Lost: no reply came.
        """
        begun = self.timeline.primary
        await self._running()
        self.cluster.issued(self.node, name)
        late = _due(self._late, name)
        if late is not None and self._reaches():
            self._haunt(work, late)
            raise Lost
        cut, event = _due(self._cuts, name), _due(self._events, name)
        await self._passes(self.takes.get(name, 0.0) + self.cluster.pace())
        if event is not None and event[0] is Cut.BEFORE:
            event[1]()
            await self._running()
        if cut is Cut.BEFORE or not self._reaches() or not self._still_follows(begun):
            raise Lost
        result = work()
        if name not in UNFLUSHED:
            self.cluster.unflushed.clear()
        await self._passes(self.cluster.pace())
        if event is not None and event[0] is Cut.AFTER:
            event[1]()
        if cut is Cut.AFTER or not self._reaches() or self.cluster.primary != begun:
            raise Lost
        await self._running()
        return result

    async def _passes(self, seconds: float) -> None:
        await (self.cluster.clock.sleep(seconds) if seconds else asyncio.sleep(0))

    def _still_follows(self, begun: int) -> bool:
        """Whether the primary is the one with which a statement was begun: no other one ever runs it."""
        self.timeline.follow()
        return self.timeline.primary == begun

    def _reaches(self) -> bool:
        return not self.is_cut and not self.cluster.away

    def _haunt(self, work: Callable[[], object], seconds: float) -> None:
        primary = self.cluster.primary

        async def later() -> None:
            await self.cluster.clock.sleep(seconds)
            if self.cluster.primary != primary:
                return  # it went with the server
            with contextlib.suppress(PgmcpError):  # nobody hears that it is refused
                work()

        ghost = asyncio.create_task(later())
        self._ghosts.add(ghost)
        ghost.add_done_callback(self._ghosts.discard)

    async def ask(self, name: str, work: Callable[[], Result]) -> Result:
        """Run a statement for those who come back later anyway.

        Raises:
            DatabaseUnavailable: it did not get through this time.
        """
        try:
            return await self.once(name, work)
        except Lost as error:
            raise _unavailable(name) from error

    async def in_turn(
        self,
        name: str,
        key: Hashable,
        work: Callable[[], Result],
        *,
        patience: float | None = None,
        gated: bool = False,
    ) -> Result:
        """Like ``persist``, one after the other for each key, and to the end also when the caller has gone."""
        turn = self._turns.setdefault((name, key), asyncio.Lock())

        async def run() -> Result:
            async with turn:
                return await self.persist(name, work, patience=patience, gated=gated)

        return await asyncio.shield(asyncio.ensure_future(run()))

    async def persist(
        self, name: str, work: Callable[[], Result], *, patience: float | None = None, gated: bool = False
    ) -> Result:
        """Run a repeatable statement until its reply comes.

        Args:
            patience: seconds until it is given up; the settings' ``hold`` unless said otherwise.
            gated: whether it is an owner's write, which waits for trust before each try.

        Raises:
            DatabaseUnavailable: the patience is over.
        """
        end = self.clock.boottime() + (self.cluster.settings.hold if patience is None else patience)
        tries = 0
        while True:
            try:
                if gated:
                    async with asyncio.timeout(max(0.0, end - self.clock.boottime())):
                        await self.gate()
                return await self.once(name, work)
            except (Lost, TimeoutError) as error:
                if self.clock.boottime() >= end:
                    raise _unavailable(name) from error
            await self.clock.sleep(BACKOFF[min(tries, len(BACKOFF) - 1)])
            tries += 1


Due = TypeVar("Due")


def _due(plans: list[tuple[str, Due]], name: str) -> Due | None:
    for plan in plans:
        if plan[0] == name:
            plans.remove(plan)
            return plan[1]
    return None


def _unavailable(name: str) -> DatabaseUnavailable:
    return DatabaseUnavailable(f"The database in memory did not answer {name}; try again.")
