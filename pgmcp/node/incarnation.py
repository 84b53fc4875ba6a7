"""One stay of a node in the cluster.

An incarnation has an id, a line, a lease, the actors that it owns and the streams that it carries. When the cluster has
declared it dead, all of that is muted and dropped at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.drain import Drain
from pgmcp.cluster.lease import Lease, LeaseState
from pgmcp.cluster.publications import Herald
from pgmcp.cluster.takeover import Takeover
from pgmcp.cluster.wakeups import Wakeups, parse
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.node.continuation import Continuation
from pgmcp.ports import Publications
from pgmcp.session import news
from pgmcp.session.adapter import Adapter
from pgmcp.session.adapters.bus import PostgresSubscriptionBus
from pgmcp.session.host import TOUCH_EVERY, Host
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from pgmcp.store.inbox import TableInbox
from pgmcp.store.line import Line, TableNotifier
from pgmcp.store.log import TableLog
from pgmcp.store.nodes import join, outgrown, own_state
from pgmcp.store.secrets import KeyRing
from pgmcp.store.takeover import TableTakeovers
from pgmcp.store.upkeep import EVERY, Upkeep
from pgmcp.types import VERSION, Change, NodeId, NodeRecord, NodeState, Publication, Wake
from pgmcp.web.admission import Admission
from pgmcp.web.edge import Edge
from pgmcp.web.tails import Tails

logger = logging.getLogger(__name__)

CAPACITY = 10_000
"""Sessions that a node may own."""


class Incarnation:
    """One stay of a node in the cluster, from joining to leaving or being declared dead.

    Args:
        busy: how many exchanges without a session this node still answers; a drain waits for them.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        box: KeyRing,
        adapter: Adapter,
        admission: Admission,
        publications: Publications,
        bus: PostgresSubscriptionBus,
        clock: Clock,
        ids: Ids,
        *,
        busy: Callable[[], int],
    ) -> None:
        self.node_id = NodeId(ids.uuid())
        self._settings, self._database, self._clock, self._ids = settings, database, clock, ids
        self.over = asyncio.Event()
        self.outgrown = False
        self.line = Line(
            settings,
            self.node_id,
            clock,
            ids,
            on_payload=lambda payload: self._hear(parse(payload)),
            on_reset=self._on_line_open,
            on_lost=self._on_line_lost,
            database=database,
        )
        self.lease = Lease(self.line, settings, clock, self._on_fenced)
        self._continuation = Continuation(database.history, self.lease, box, clock)
        acting = self._continuation.acting
        self.tails = Tails()
        self._upkeep = Upkeep(database, ids)
        self.wakeups = Wakeups(self.node_id, TableNotifier(database), clock, self._hear)
        self.inbox = TableInbox(database, self.node_id, clock, ids, acting)
        self.log = TableLog(database, self.node_id, clock, acting)
        takeovers = TableTakeovers(database, self.node_id, acting)
        self._bus = bus
        self.herald = Herald(publications, clock, tell=self._tell, missed=self._missed)
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
            heard=self.wakeups.stream,
            ended=self.wakeups.ended,
        )
        self._continuation.watch(self.host)
        self.takeover = Takeover(
            self.node_id,
            takeovers,
            self.lease,
            clock,
            ids,
            room=lambda: CAPACITY - self.host.sessions,
            tell=self.wakeups.orphans,
            wake=self.wakeups.inbox,
            own=self.host.take_on,
            sweep_every=settings.poll,
        )
        self.edge = Edge(
            inbox=self.inbox,
            log=self.log,
            lease=self.lease,
            wakeups=self.wakeups,
            takeover=self.takeover,
            tails=self.tails,
            admission=admission,
            host=self.host,
            adapter=adapter,
            box=box,
            settings=settings,
            clock=clock,
            ids=ids,
            term=lambda: database.history.term,
        )
        self._drain = Drain(
            self.host, takeovers, clock, waiting=lambda: self.tails.patient + busy(), told=self.wakeups.handed
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, schema_revision: str) -> None:
        """Enter the cluster: row, line, first renewal, ready.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached.
            SchemaError: the database needs a newer build.
        """
        settings = self._settings
        address = settings.address or f"{settings.host}:{settings.port}"
        record = NodeRecord(self.node_id, settings.node_name, address, VERSION, schema_revision, CAPACITY)
        await join(self._database, record)
        await self.line.open()
        await self.lease.renew()
        await self.herald.begin()
        if not await self.line.set_state(NodeState.READY):
            message = "This node's row vanished while it joined; it tries again."
            raise DatabaseUnavailable(message)
        self._tasks = [
            asyncio.create_task(self.lease.run()),
            asyncio.create_task(self._continuation.run()),
            asyncio.create_task(self.takeover.watch()),
            asyncio.create_task(self.takeover.sweep_for_ever()),
            asyncio.create_task(self._every(settings.poll, self.host.poll)),
            asyncio.create_task(self._every(settings.poll, self._look_while_deaf)),
            asyncio.create_task(self._every(settings.poll, self.herald.poll)),
            asyncio.create_task(self._every(settings.idle_poll, self.host.survey)),
            asyncio.create_task(self._every(EVERY, self._sweep)),
            asyncio.create_task(self._every(TOUCH_EVERY, self.host.note_activity)),
            asyncio.create_task(self._every(settings.idle_poll, self._look_at_schema)),
        ]

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
        return await own_state(self._database, self.node_id) is NodeState.DRAINING

    async def leave(self) -> None:
        """Stop everything: exchanges end with their final chunk, actors are muted, the row says that we left."""
        for task in self._tasks:
            task.cancel()
        self.edge.leave(at_once=True)
        await self.herald.close()
        await self.takeover.close()
        fenced = self.lease.state is LeaseState.FENCED
        if not fenced:
            await self.host.export()
        await self.host.close()
        if not fenced:
            with contextlib.suppress(PgmcpError):
                await self.line.set_state(NodeState.LEFT)
                self.wakeups.orphans()
        await self.wakeups.close()
        await self.line.close()

    def _on_fenced(self) -> None:
        logger.warning("node %s was declared dead by the cluster; it joins again", self.node_id)
        self.edge.leave(at_once=True)
        self.over.set()

    def _on_line_lost(self) -> None:
        self.lease.hurry()

    def _on_line_open(self) -> None:
        self._hear(Wake(everything=True))
        self.herald.look(gap=True)

    async def _tell(self, publications: Sequence[Publication]) -> None:
        await news.tell(self.host.news, publications)
        await self._bus.tell(publications)

    async def _missed(self, changed: Collection[Change]) -> None:
        await news.missed(self.host.news, changed)
        await self._bus.missed()

    def _hear(self, wake: Wake) -> None:
        if wake.everything:
            self.host.wake_all()
            self.tails.wake_all()
        if wake.everything or wake.published:
            self.herald.look()
        if wake.everything or wake.orphans:
            self.takeover.orphaned()
        for ownership in wake.handed:
            self.host.take_on(ownership)
        for session in wake.inboxes:
            self.host.wake(session)
        for session in wake.ended:
            self.host.drop(session)
        self.tails.wake(wake.streams)
        if wake.ended:
            self.tails.end(wake.ended)

    async def _look_while_deaf(self) -> None:
        if not self.line.up:
            self._hear(Wake(everything=True))

    async def _look_at_schema(self) -> None:
        if not self.outgrown and await outgrown(self._database):
            self.outgrown = True
            logger.error("the database has come to need a newer build than this one: replace this node")

    async def _sweep(self) -> None:
        for session in await self._upkeep.expire():
            self.wakeups.ended(session)
        await self._upkeep.prune()

    async def _every(self, seconds: float, work: Callable[[], Any]) -> None:
        while True:
            await self._clock.sleep(self._ids.jitter(seconds))
            if self.lease.trusted:
                try:
                    await work()
                except PgmcpError as error:
                    logger.info("%s is tried again later: %s", work.__name__, error)
