"""One stay of a node in the cluster.

An incarnation has an id, a line, a lease, the actors that it owns and the streams that it carries. Its services start
in order, run as one group and stop in reverse.

Failure handling: when the cluster has declared it dead, all of that is muted and dropped at once. So it is when one of
its services fails in a way that nobody expected; then the row says that the node left, its sessions go to other nodes
or are taken back by the node's next incarnation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.drain import Drain
from pgmcp.cluster.lease import Lease, LeaseState
from pgmcp.cluster.publications import PublicationReader
from pgmcp.cluster.takeover import Takeover
from pgmcp.cluster.wakeups import Wakeups, parse
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.node.catch_up import HURRY_SECONDS, CatchUp
from pgmcp.node.reported_changes import ReportedChanges
from pgmcp.node.timeline import TimelineChange
from pgmcp.ports import Publications
from pgmcp.service import Faults, Periodic, Service, failure
from pgmcp.session import change_notices
from pgmcp.session.adapter import Adapter, Bus
from pgmcp.session.host import Host
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from pgmcp.store.encryption.key_rings import KeyRing
from pgmcp.store.encryption.payloads import Payloads
from pgmcp.store.inbox import TableInbox
from pgmcp.store.line import Line
from pgmcp.store.log import TableLog
from pgmcp.store.nodes import join, no_older, outgrown, own_state
from pgmcp.store.notifier import TableNotifier
from pgmcp.store.retention import EVERY_SECONDS, Retention
from pgmcp.store.takeover import TableTakeovers
from pgmcp.types import VERSION, Change, NodeRecord, NodeState, Publication, Wake, node_id
from pgmcp.web.abandoned_streams import AbandonedStreams
from pgmcp.web.admission import Admission
from pgmcp.web.edge import Edge
from pgmcp.web.open_streams import OpenStreams

logger = logging.getLogger(__name__)

CAPACITY = 10_000
"""Sessions that a node may own."""

STOP_SECONDS = 10.0
"""Seconds that one service may take to stop."""


class Incarnation(Service):
    """One stay of a node in the cluster, from joining to leaving or being declared dead.

    Args:
        revision: the schema's.
        serves: the name of what this node serves.
        faults: counts unexpected errors; the first one of a service ends the incarnation.
        busy: how many exchanges without a session this node still answers; a drain waits for them.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        box: KeyRing,
        payloads: Payloads,
        adapter: Adapter,
        admission: Admission,
        publications: Publications,
        bus: Bus,
        clock: Clock,
        ids: Ids,
        *,
        revision: str,
        serves: str,
        faults: Faults,
        busy: Callable[[], int],
    ) -> None:
        self.node_id = node_id(ids.uuid())
        self._settings, self._database, self._clock, self._ids = settings, database, clock, ids
        self._revision, self._serves, self.faults = revision, serves, faults
        self._seals = payloads.sealing
        self.over = asyncio.Event()
        self.outgrown = self.failed = False
        self.junk = 0
        """Words in wake-ups that said nothing to this build."""
        self.line = Line(
            settings,
            self.node_id,
            clock,
            ids,
            on_payload=self._on_payload,
            on_broadcast=self._on_broadcast,
            on_reset=self._on_line_open,
            on_lost=self._on_line_lost,
            database=database,
        )
        self.lease = Lease(self.line, settings, clock, self._on_fenced)
        self._timeline_change = TimelineChange(database.timeline, self.lease, box, clock)
        acting = self._timeline_change.acting
        self.open_streams = OpenStreams()
        self.retention = Retention(database, ids)
        self.wakeups = Wakeups(self.node_id, TableNotifier(database), clock, self._wake_self)
        self.inbox = TableInbox(database, self.node_id, clock, ids, acting, payloads)
        self.log = TableLog(database, self.node_id, clock, acting, payloads)
        takeovers = TableTakeovers(database, self.node_id, acting, payloads)
        self._bus = bus
        self.publication_reader = PublicationReader(
            publications, clock, on_publications=self._tell, on_gap=self._missed, faults=faults
        )
        self.host = Host(
            adapter,
            inbox=self.inbox,
            log=self.log,
            takeovers=takeovers,
            box=box,
            settings=settings,
            clock=clock,
            ids=ids,
            trusted=acting,
            wake_sink=self.wakeups.stream,
            tell_ended=self.wakeups.ended,
            faults=faults,
        )
        self._timeline_change.watch(self.host, self.publication_reader)
        self.takeover = Takeover(
            self.node_id,
            takeovers,
            self.lease,
            clock,
            ids,
            room=lambda: CAPACITY - self.host.sessions,
            tell_orphans=self.wakeups.orphans,
            wake_owner=self.wakeups.inbox,
            take_on=self.host.take_on,
            sweep_every=settings.poll,
            faults=faults,
        )
        self.edge = Edge(
            node=self.node_id,
            inbox=self.inbox,
            log=self.log,
            lease=self.lease,
            wakeups=self.wakeups,
            takeover=self.takeover,
            open_streams=self.open_streams,
            admission=admission,
            host=self.host,
            adapter=adapter,
            box=box,
            settings=settings,
            clock=clock,
            ids=ids,
            term=lambda: database.timeline.term,
        )
        self._drain = Drain(
            self.host,
            takeovers,
            clock,
            waiting=lambda: self.open_streams.patient + busy(),
            wake_new_owner=self.wakeups.handed,
        )
        self.reported_changes = ReportedChanges(self.node_id, self.host, self.open_streams, self.inbox, clock)
        self.catch_up = CatchUp(self.host, self.open_streams, self.publication_reader, self.takeover, clock, ids)
        abandoned = AbandonedStreams(self.log, self.open_streams, clock, settings.statement_timeout)
        self._membership: dict[str, Service] = {
            "the line": self.line,
            "the lease": self.lease,
            "the change of timeline": self._timeline_change,
            "the wake-ups": self.wakeups,
        }
        self._work: dict[str, Service] = {
            "the host": self.host,
            "the takeover": self.takeover,
            "the publication reader": self.publication_reader,
            "the reported changes": self.reported_changes,
            "the catch-up": self.catch_up,
            "the look for messages": self._periodic(settings.poll, self.host.poll),
            "the look while deaf": self._periodic(settings.poll, self._look_while_deaf),
            "the hurry while deaf": self._periodic(HURRY_SECONDS, self._hurry_while_deaf),
            "the look for publications": self._periodic(settings.poll, self.publication_reader.poll),
            "the survey": self._periodic(settings.idle_poll, self.host.survey),
            "the look at streams": self._periodic(settings.idle_poll, abandoned.let_go),
            "the retention": self._periodic(EVERY_SECONDS, self.sweep),
            "the look at the schema": self._periodic(settings.idle_poll, self._look_at_schema),
        }

    def _periodic(self, seconds: float, work: Callable[[], Awaitable[None]]) -> Periodic:
        return Periodic(seconds, work, self._clock, self._ids, allowed=lambda: self.lease.trusted)

    async def start(self) -> None:
        """Enter the cluster: row, line, first renewal, ready.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached.
            SchemaError: the database needs a newer build.
            OtherServer: the cluster serves something else.
        """
        settings = self._settings
        address = settings.address or "unknown"  # whoever brings the HTTP server knows it
        record = NodeRecord(self.node_id, settings.node_name, address, VERSION, self._revision, self._serves)
        await join(self._database, record)
        if self._seals:
            await no_older(self._database)
        for service in (self._membership | self._work).values():
            await service.start()
        if not await self.line.set_state(NodeState.READY):
            message = "This node's row vanished while it joined; it tries again."
            raise DatabaseUnavailable(message)

    async def run(self) -> None:
        """Live until the cluster declares this node dead, or something fails that nobody expected."""
        async with asyncio.TaskGroup() as group:
            services = (self._membership | self._work).items()
            tasks = [group.create_task(self._supervised(duty, service), name=duty) for duty, service in services]
            await self.over.wait()
            for task in tasks:
                task.cancel()

    async def _supervised(self, duty: str, service: Service) -> None:
        error = await failure(service)
        if not self.over.is_set():
            self.faults.note(duty, error or RuntimeError("it ended, and nobody had asked for that"))
            self.failed = True
            self.lease.fence()

    async def stop(self) -> None:
        """Leave, in order: nobody is told anything more, work stops, the row says that we left, the line is cut."""
        self.over.set()
        dead = self.lease.state is LeaseState.FENCED and not self.failed
        self.edge.leave(at_once=True)
        if not dead and not self.failed:
            await self.host.export()
        self.host.mute()
        await self._stop(self._work)
        if not dead:
            with contextlib.suppress(PgmcpError):
                await self.line.set_state(NodeState.LEFT)
                self.wakeups.orphans()
        await self._stop(self._membership)

    async def _stop(self, services: dict[str, Service]) -> None:
        """Stop services in reverse; one that cannot be stopped is in nobody's way."""
        for duty, service in reversed(services.items()):
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await service.stop()
            except Exception as error:  # noqa: BLE001 - it is noted
                self.faults.note(f"the end of {duty}", error)

    async def announce(self) -> None:
        """Say that this node leaves: nobody gives it sessions any more."""
        with contextlib.suppress(PgmcpError):
            await self.line.set_state(NodeState.DRAINING)

    async def drain(self, shut: Callable[[], Awaitable[None]]) -> None:
        """Give away what this node owns, and finish what cannot go on elsewhere.

        Args:
            shut: closes the node's port, when nothing new is to begin here any more.
        """
        await self._drain.run(self._settings.drain_limit, shut)
        self.edge.leave()

    async def asked_to_drain(self) -> bool:
        """Whether somebody wrote into this node's row that it should leave."""
        state = await own_state(self._database, self.node_id)
        if state is NodeState.JOINING:  # a failover has lost that it was ready
            await self.line.set_state(NodeState.READY)
        return state is NodeState.DRAINING

    def _on_fenced(self) -> None:
        if not self.failed:
            logger.warning("node %s was declared dead by the cluster; it joins again", self.node_id)
        self.host.mute()  # first: what an actor may not store any more would end its session
        self.edge.leave(at_once=True)
        self.over.set()

    def _on_line_lost(self) -> None:
        self.lease.hurry()

    def _on_line_open(self, *, crashed: bool) -> None:
        if crashed:
            self.inbox.look_anew()
            # its horizon names transactions by ids that may have been given out anew
            self.publication_reader.look(gap=True)
        self.catch_up.begin()

    async def _tell(self, publications: Sequence[Publication]) -> None:
        await change_notices.tell(self.host.change_notices, publications)
        await self._bus.tell(publications)

    async def _missed(self, changed: Collection[Change]) -> None:
        await change_notices.missed(self.host.change_notices, changed)
        await self._bus.missed()

    def _wake_self(self, wake: Wake) -> None:
        """Hear what this node tells itself: that was committed."""
        if wake.published:
            self.publication_reader.look()
        for session in wake.inboxes:
            self.host.wake(session)
        self.open_streams.wake(wake.streams)
        if wake.ended:
            self.reported_changes.end(wake.ended)

    def _on_payload(self, payload: str) -> None:
        """Look at what somebody says to this node."""
        wake = self._read(payload)
        for session in wake.inboxes:
            self.host.wake(session)
        self.open_streams.wake(wake.streams)
        if wake.handed:
            self.reported_changes.hear(handed=wake.handed)

    def _on_broadcast(self, payload: str) -> None:
        """Look at what somebody says to all nodes."""
        wake = self._read(payload)
        if wake.published:
            self.publication_reader.look()
        if wake.orphans:
            self.takeover.orphaned()
        if wake.ended:
            self.reported_changes.hear(ended=wake.ended)

    def _read(self, payload: str) -> Wake:
        wake = parse(payload)
        self.junk += wake.junk
        if wake.everything:
            self.catch_up.begin()
        return wake

    async def _look_while_deaf(self) -> None:
        if self.line.deaf:
            self.catch_up.begin()

    async def _hurry_while_deaf(self) -> None:
        if self.line.deaf:
            await self.catch_up.hurry()

    async def _look_at_schema(self) -> None:
        before, problem = self.outgrown, await outgrown(self._database)
        self.outgrown = problem is not None
        if problem is not None and not before:
            logger.error("the schema does not fit this node any more: %s", problem)
        elif before and problem is None:
            logger.warning("the schema fits this node again")

    async def sweep(self) -> None:
        """Do one round of the retention: what is over goes."""
        for session in await self.retention.expire():
            self.wakeups.ended(session)
        await self.retention.prune()
