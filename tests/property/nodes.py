"""Simulated nodes: the real lease, takeover, wake-ups, host and actors on ports in memory, in a time that stands still.

A node's process can freeze (nothing of it runs, its statements under way arrive), lose its line, be cut off from the
database, or be gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast
from uuid import UUID

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.lease import Lease, LeaseState
from pgmcp.cluster.publications import PublicationReader
from pgmcp.cluster.takeover import Takeover
from pgmcp.cluster.wakeups import Wakeups, parse
from pgmcp.errors import PgmcpError
from pgmcp.node.reported_changes import ReportedChanges
from pgmcp.node.timeline import TimelineChange
from pgmcp.service import Faults
from pgmcp.session.host import Host
from pgmcp.settings import Settings
from pgmcp.types import NodeId, NodeState, SessionKey, Wake
from pgmcp.web.open_streams import OpenStreams
from tests.harness.clock import FakeClock
from tests.harness.memory import MemoryCluster, MemoryTimeline, memory_store
from tests.property.server import Tools

if TYPE_CHECKING:
    from pgmcp.store.encryption.key_rings import KeyRing
    from pgmcp.store.timeline import Timeline

ROOM = 100
REOPEN = 0.3
ROUND_TRIP = 0.02


class SeededIds(Ids):
    """Ids that are the same in each run of an example."""

    def __init__(self) -> None:
        self._random = random.Random(1)
        self._count = 0

    def uuid(self) -> UUID:
        self._count += 1
        return UUID(int=(self._count << 80) | (7 << 76) | (0b10 << 62) | self._count)

    def token(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    def number(self, below: int) -> int:
        return self._random.randrange(below)

    def jitter(self, seconds: float) -> float:
        return seconds * (0.5 + self._random.randrange(1000) / 2000)


class ProcessClock(Clock):
    """The time of one process: its own zero, a wall clock that is wrong, and nothing happens while it is frozen."""

    def __init__(self, physical: FakeClock, number: int) -> None:
        self._physical, self._zero, self._skew = physical, 1000.0 * number, 77_777.0 * number
        self._thawed = asyncio.Event()
        self._thawed.set()

    @property
    def frozen(self) -> bool:
        return not self._thawed.is_set()

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    async def running(self) -> None:
        """Return when the process runs."""
        while self.frozen:
            await self._thawed.wait()

    def boottime(self) -> float:
        return self._physical.now + self._zero

    def wall(self) -> float:
        return self._physical.now + self._skew

    async def sleep(self, seconds: float) -> None:
        await self._physical.sleep(seconds)
        await self.running()

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        if not event.is_set():
            tasks = asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._physical.sleep(seconds))
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
        await self.running()
        return event.is_set()


class Keys:
    """Boxes that seal nothing; opening one may take a look at the database first.

    Args:
        look: reads the keys anew.
    """

    def __init__(self, clock: Clock, look: Callable[[], Awaitable[None]]) -> None:
        self._clock, self.load, self.takes = clock, look, 0.0

    def seal(self, plain: bytes, place: bytes) -> bytes:
        return place + b"|" + plain

    async def open(self, sealed: bytes, place: bytes) -> bytes:
        seconds, self.takes = self.takes, 0.0
        if seconds:
            await self._clock.sleep(seconds)
        where, _, plain = sealed.partition(b"|")
        assert where == place
        return plain


class Witness(Protocol):
    """Who is told what nodes do."""

    def taken(self, node: SimNode) -> None: ...

    def ran(self, node: SimNode, rpc_id: str) -> None: ...

    def adds(self, node: SimNode, rpc_id: str) -> Callable[[int], None]: ...


async def _nothing(_: object) -> None:
    return None


class SimNode:
    """One incarnation of a node.

    Args:
        timeline: what its process follows; None for a process that begins.
    """

    def __init__(
        self,
        number: int,
        cluster: MemoryCluster,
        physical: FakeClock,
        ids: Ids,
        settings: Settings,
        witness: Witness,
        timeline: MemoryTimeline | None = None,
    ) -> None:
        self.number, self._settings, self._physical, self._cluster = number, settings, physical, cluster
        self.clock, self.gone, self.left = ProcessClock(physical, number), False, False
        self.well_since = 0.0
        self.timeline = timeline or MemoryTimeline(cluster)
        self.store = memory_store(
            cluster, self.clock, ids, running=self.clock.running, gate=self._acting, timeline=self.timeline
        )
        self.node = self.store.node
        self.store.wire.takes["renew"] = ROUND_TRIP  # what else happens at once comes before
        self.keys, self.faults = Keys(self.clock, self._look_for_keys), Faults()
        self.lease = Lease(self.store.lease, settings, self.clock, self._on_fenced)
        self.timeline_change = TimelineChange(
            cast("Timeline", self.timeline), self.lease, cast("KeyRing", self.keys), self.clock
        )
        self.wakeups = Wakeups(self.node, self.store.notifier, self.clock, self._wake_self)
        self.host = Host(
            Tools(
                self.clock,
                lambda: witness.taken(self),
                lambda rpc_id: witness.ran(self, rpc_id),
                lambda rpc_id: witness.adds(self, rpc_id),
            ),
            inbox=self.store.inbox,
            log=self.store.log,
            takeovers=self.store.takeovers,
            box=self.keys,
            settings=settings,
            clock=self.clock,
            ids=ids,
            trusted=self._acting,
            wake_sink=self.wakeups.stream,
            tell_ended=self.wakeups.ended,
            faults=self.faults,
        )
        self.takeover = Takeover(
            self.node,
            self.store.takeovers,
            self.lease,
            self.clock,
            ids,
            room=lambda: ROOM - self.host.sessions,
            tell_orphans=self.wakeups.orphans,
            wake_owner=self.wakeups.inbox,
            take_on=self.host.take_on,
            sweep_every=settings.poll,
            faults=self.faults,
        )
        publication_reader = PublicationReader(  # nothing is published here
            self.store.publications, self.clock, on_publications=_nothing, on_gap=_nothing, faults=self.faults
        )
        self.timeline_change.watch(self.host, publication_reader)
        self.reported_changes = ReportedChanges(self.node, self.host, OpenStreams(), self.store.inbox, self.clock)
        self._ids, self._line_up = ids, False
        self.over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def alive(self) -> bool:
        return not (self.gone or self.left or self.over.is_set())

    async def _acting(self) -> None:
        await self.timeline_change.acting()

    async def _look_for_keys(self) -> None:
        await self.store.wire.ask("key_ring", lambda: None)

    async def join(self) -> None:
        """Enter the cluster, as soon as the database lets it."""
        while not self.over.is_set():
            try:
                await self.store.lease.join()
                self._listen()
                await self.lease.renew()
                if await self.store.lease.set_state(NodeState.READY):
                    break
            except PgmcpError:
                pass
            await self.clock.sleep(0.5)
        self._tasks += [
            asyncio.create_task(self.lease.run()),
            asyncio.create_task(self.timeline_change.run()),
            asyncio.create_task(self.takeover.run()),
            asyncio.create_task(self.wakeups.run()),
            asyncio.create_task(self.host.run()),
            asyncio.create_task(self.reported_changes.run()),
            asyncio.create_task(self._every(self._settings.poll, self.host.poll)),
            asyncio.create_task(self._every(self._settings.poll, self._look_while_deaf)),
            asyncio.create_task(self._every(self._settings.idle_poll, self.host.survey)),
            asyncio.create_task(self._every(self._settings.poll, self._look_at_its_row)),
        ]

    async def _every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self.clock.sleep(self._ids.jitter(seconds))
            if self.lease.trusted:
                with contextlib.suppress(PgmcpError):
                    await work()

    async def _look_at_its_row(self) -> None:
        """As ``Incarnation.asked_to_drain`` does."""
        row = await self.store.wire.ask("own_state", lambda: self._cluster.nodes.get(self.node))
        if row is not None and row.state is NodeState.JOINING:
            await self.store.lease.set_state(NodeState.READY)

    async def _look_while_deaf(self) -> None:
        if not self._line_up:
            self._catch_up()

    def _on_fenced(self) -> None:
        self.over.set()

    async def stop(self) -> None:
        """Stop everything, as a node does that was declared dead or leaves."""
        for task in self._tasks:
            task.cancel()
        await self.takeover.stop()
        await self.host.stop()

    async def leave(self) -> None:
        """Leave in an orderly way."""
        self.left = True
        await self.stop()
        try:
            await self.store.lease.set_state(NodeState.LEFT)
        except PgmcpError:
            return
        self.wakeups.orphans()
        await self.wakeups.stop()

    # -- wake-ups and the line ---------------------------------------------------------------------------------------

    async def give_away(self, session: SessionKey, to: NodeId, *, busy: bool) -> None:
        """Give a session to another node, as a drain does."""
        moved = await self.host.hand_over(session, to, busy=busy)
        if moved is not None:
            self.wakeups.handed(to, moved)

    def _wake_self(self, wake: Wake) -> None:
        """Hear what this node tells itself."""
        for session in wake.inboxes:
            self.host.wake(session)
        self.reported_changes.end(wake.ended)

    def _hear(self, wake: Wake) -> None:
        """Hear what somebody says."""
        if wake.everything:
            self._catch_up()
        if wake.orphans:
            self.takeover.orphaned()
        for session in wake.inboxes:
            self.host.wake(session)
        if wake.ended or wake.handed:
            self.reported_changes.hear(ended=wake.ended, handed=wake.handed)

    def _catch_up(self) -> None:
        self.takeover.orphaned()
        self.host.look()
        self._spawn(self._drop_strangers())

    async def _drop_strangers(self) -> None:
        with contextlib.suppress(PgmcpError):
            await self.host.drop_strangers()

    def _hear_payload(self, payload: str) -> None:
        if not self.store.wire.is_cut and not self.gone:
            self._spawn(self._heard_when_running(payload))

    async def _heard_when_running(self, payload: str) -> None:
        await self.clock.running()
        if self.alive:
            self._hear(parse(payload))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(work))

    def _listen(self) -> None:
        self.store.lease.hang_up()
        self.store.lease.listen(self._hear_payload)
        self._line_up = True

    def lose_line(self) -> None:
        """The backend is gone; the node hears of it when it runs."""
        self.store.lease.hang_up()
        self.notice_lost_line()

    def notice_lost_line(self) -> None:
        """The node's end of the line is gone; it reopens it."""
        if not self.gone and self._line_up:
            self._line_up = False
            self._spawn(self._reopen())

    async def _reopen(self) -> None:
        await self.clock.running()
        self.store.lease.notice()
        self.lease.hurry()
        while not self._line_up:
            await self.clock.sleep(self._ids.jitter(REOPEN))
            try:
                await self.store.wire.ask("listen", lambda: None)
            except PgmcpError:
                continue
            self._listen()
            self._catch_up()

    # -- what befalls it ---------------------------------------------------------------------------------------------

    def die(self) -> None:
        """The process is gone, and with it its connections."""
        self.gone = True
        self.clock.freeze()
        self.store.lease.hang_up()

    def stand_still(self, seconds: float) -> None:
        """The process freezes for a while."""
        if self.alive and not self.clock.frozen:
            self.clock.freeze()
            self._spawn(self._go_on(seconds))

    async def _go_on(self, seconds: float) -> None:
        await self._physical.sleep(seconds)
        if not self.gone:
            self.thaw()

    def thaw(self) -> None:
        """The process runs again."""
        self.clock.thaw()
        self.recovered()

    @property
    def may_act(self) -> bool:
        """What the lease should say, reckoned from its last good renewal."""
        joined = self.lease.state is not LeaseState.JOINING
        return joined and self.clock.boottime() < self.lease.renewed_at + self._settings.trust

    @property
    def is_well(self) -> bool:
        """Whether this node renews, or is kept from it only by what all nodes suffer."""
        if self.gone or self.left or self.clock.frozen or self.store.wire.is_cut:
            return False
        return self.lease.state is not LeaseState.JOINING and self.lease.renewed_at >= self.well_since

    def recovered(self) -> None:
        """Nothing hinders this node any more: from its next renewal on it is well."""
        self.well_since = self.clock.boottime()
