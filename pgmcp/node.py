"""The composition root: builds one node and starts and stops its services in order.

A node lives through one or more incarnations. An incarnation has an id, a line, a lease, the actors that it owns and
the streams that it carries. When the cluster has declared it dead, all of that is muted and dropped at once, and the
node joins again as a new incarnation, over the same pool and the same served server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import uvicorn
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from starlette.types import ASGIApp

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.lease import Lease, LeaseState
from pgmcp.cluster.takeover import Takeover
from pgmcp.cluster.wakeups import Wakeups, parse
from pgmcp.errors import DatabaseUnavailable, NodeNotReady, PgmcpError, SettingsError
from pgmcp.ops.access import AccessLog
from pgmcp.ops.health import health_routes
from pgmcp.ops.logs import configure, mask_session_ids
from pgmcp.session.adapter import Adapter
from pgmcp.session.adapters.target import load, target_of
from pgmcp.session.host import TOUCH_EVERY, Host
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from pgmcp.store.inbox import TableInbox
from pgmcp.store.line import Line, TableNotifier
from pgmcp.store.log import TableLog
from pgmcp.store.nodes import join
from pgmcp.store.secrets import KeyRing
from pgmcp.store.takeover import TableTakeovers
from pgmcp.store.upkeep import EVERY, Upkeep
from pgmcp.types import VERSION, NodeId, NodeRecord, NodeState, Wake
from pgmcp.web.admission import Admission
from pgmcp.web.application import Application, host_rules
from pgmcp.web.edge import Edge
from pgmcp.web.legacy import SseMessages, SseStream
from pgmcp.web.streamable import Streamable
from pgmcp.web.tails import Tails

logger = logging.getLogger(__name__)

REJOIN = 0.5
"""Seconds between attempts to join again."""

CAPACITY = 10_000

KEEP_ALIVE = 75
"""Seconds for which an idle HTTP connection stays: longer than in balancers, or they POST into one that just closes."""


class Incarnation:
    """One stay of a node in the cluster, from joining to leaving or being declared dead."""

    def __init__(
        self, settings: Settings, database: Database, box: KeyRing, adapter: Adapter, clock: Clock, ids: Ids
    ) -> None:
        self.node_id = NodeId(ids.uuid())
        self._settings, self._database, self._clock, self._ids = settings, database, clock, ids
        self.over = asyncio.Event()
        self.line = Line(
            settings,
            self.node_id,
            clock,
            ids,
            on_payload=lambda payload: self._hear(parse(payload)),
            on_reset=lambda: self._hear(Wake(everything=True)),
            on_lost=self._on_line_lost,
            database=database,
        )
        self.lease = Lease(self.line, settings, clock, self._on_fenced)
        self.tails = Tails()
        self._upkeep = Upkeep(database)
        self.wakeups = Wakeups(self.node_id, TableNotifier(database), clock, self._hear)
        self.inbox = TableInbox(database, self.node_id, clock, ids, self.lease.acting)
        self.log = TableLog(database, self.node_id, clock, self.lease.acting)
        takeovers = TableTakeovers(database, self.node_id)
        self.host = Host(
            adapter,
            inbox=self.inbox,
            log=self.log,
            takeovers=takeovers,
            box=box,
            settings=settings,
            clock=clock,
            ids=ids,
            trusted=self.lease.acting,
            heard=self.wakeups.stream,
            ended=self.wakeups.ended,
        )
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
            admission=Admission(clock),
            host=self.host,
            adapter=adapter,
            box=box,
            settings=settings,
            clock=clock,
            ids=ids,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, schema_revision: str) -> None:
        """Enter the cluster: row, line, first renewal, ready.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached.
        """
        settings = self._settings
        address = settings.address or f"{settings.host}:{settings.port}"
        record = NodeRecord(self.node_id, settings.node_name, address, VERSION, schema_revision, CAPACITY)
        await join(self._database, record)
        await self.line.open()
        await self.lease.renew()
        if not await self.line.set_state(NodeState.READY):
            message = "This node's row vanished while it joined; it tries again."
            raise DatabaseUnavailable(message)
        self._tasks = [
            asyncio.create_task(self.lease.run()),
            asyncio.create_task(self.takeover.watch()),
            asyncio.create_task(self.takeover.sweep_for_ever()),
            asyncio.create_task(self._every(settings.poll, self.host.poll)),
            asyncio.create_task(self._every(settings.poll, self._look_while_deaf)),
            asyncio.create_task(self._every(settings.idle_poll, self.host.survey)),
            asyncio.create_task(self._every(EVERY, self._sweep)),
            asyncio.create_task(self._every(TOUCH_EVERY, self.host.note_activity)),
        ]

    async def leave(self) -> None:
        """Stop everything: exchanges end with their final chunk, actors are muted, the row says that we left."""
        for task in self._tasks:
            task.cancel()
        self.edge.leave()
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
        self.edge.leave()
        self.over.set()

    def _on_line_lost(self) -> None:
        self.lease.hurry()

    def _hear(self, wake: Wake) -> None:
        if wake.everything:
            self.host.wake_all()
            self.tails.wake_all()
        if wake.everything or wake.orphans:
            self.takeover.orphaned()
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


class Node:
    """One node: database, served server, present incarnation.

    Args:
        settings: the node's settings.
        served: an MCP server object that an adapter knows.
    """

    def __init__(
        self, settings: Settings, served: object, *, clock: Clock | None = None, ids: Ids | None = None
    ) -> None:
        if not settings.database_url:
            message = "No database given: use --database-url or PGMCP_DATABASE_URL (postgresql://user:password@host/db)"
            raise SettingsError(message)
        self.settings, self._clock, self._ids = settings, clock or Clock(), ids or Ids()
        self._database = Database(settings, self._clock)
        self._box = KeyRing(self._database)
        self._target = target_of(served, settings.mcp_path)
        self._incarnation: Incarnation | None = None
        self._revision, self._started = "", False
        self.failure: PgmcpError | None = None

    def endpoints(self) -> dict[str, ASGIApp]:
        """The node's MCP endpoints by their paths, behind the served server's authentication."""
        settings, security = self.settings, host_rules(self.settings)

        def edge() -> Edge:
            return self.incarnation().edge

        messages = settings.messages_path
        endpoints: dict[str, ASGIApp] = {
            settings.mcp_path: Streamable(edge, security=security, settings=settings),
            settings.sse_path: SseStream(edge, security=security, settings=settings, messages=messages),
            messages.rstrip("/"): SseMessages(edge, security=security, settings=settings),
        }
        return {path: self._target.protect(endpoint) for path, endpoint in endpoints.items()}

    def health(self) -> list[HTTPRouteHandler]:
        """The health routes."""
        return health_routes(lambda: self)

    def application(self) -> Application:
        """The node as an ASGI application; its lifespan runs the node."""
        litestar = Litestar(
            route_handlers=self.health(),
            lifespan=[lambda _: self.running()],
            openapi_config=None,
            logging_config=None,
        )
        return Application(self.endpoints(), self._target.routes, litestar, self.running, self.logged)

    def logged(self, app: ASGIApp) -> ASGIApp:
        """An application behind the access log, if that is wanted."""
        return AccessLog(app, self._clock) if self.settings.access_log else app

    def incarnation(self) -> Incarnation:
        """The present incarnation.

        Raises:
            NodeNotReady: the node is joining or leaving.
        """
        if not self._started:
            message = (
                "The lifespan of pgmcp's application was not run, so it is not part of the cluster. When you mount it, "
                "run it from yours: lifespan=lambda _: app.lifespan()."
            )
            raise NodeNotReady(message)
        if self._incarnation is None:
            message = "This node is not part of the cluster now; try again or ask another one."
            raise NodeNotReady(message)
        return self._incarnation

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the node: check the schema, join, keep a live incarnation, leave.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached at the start.
            SchemaError: the schema is not the one that this build understands.
        """
        self._started = True
        mask_session_ids()  # whoever runs the HTTP server
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._start(stack)
            except PgmcpError as error:
                self.failure = error
                raise
            yield

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """Start the node's services in order; the stack stops them in reverse."""
        stack.push_async_callback(self._database.close)
        await self._database.open()
        self._revision = await self._database.revision()
        await self._box.load()
        await stack.enter_async_context(self._target.adapter.lifespan())
        await self._enter()
        stack.push_async_callback(self._exit)
        keeper = asyncio.create_task(self._keep())
        stack.push_async_callback(asyncio.wait, {keeper})
        stack.callback(keeper.cancel)

    async def _enter(self) -> None:
        incarnation = Incarnation(
            self.settings, self._database, self._box, self._target.adapter, self._clock, self._ids
        )
        try:
            await incarnation.join(self._revision)
        except BaseException:
            await incarnation.leave()
            raise
        self._incarnation = incarnation
        logger.info("node %s (%s) joined", self.settings.node_name, incarnation.node_id)

    async def _exit(self) -> None:
        incarnation, self._incarnation = self._incarnation, None
        if incarnation is not None:
            await incarnation.leave()

    async def _keep(self) -> None:
        """Replace an incarnation that was declared dead."""
        while True:
            if self._incarnation is not None:
                await self._incarnation.over.wait()
                await self._exit()
            try:
                await self._enter()
            except PgmcpError as error:
                logger.warning("joining again failed: %s", error)
                await self._clock.sleep(REJOIN)

    def stop_streams(self) -> None:
        """End every exchange with its final chunk, so that the HTTP server can stop."""
        if self._incarnation is not None:
            self._incarnation.edge.leave()

    def stalled(self) -> float:
        """See ``Pulse.stalled``."""
        if self._incarnation is None:
            return 0.0
        return self._clock.boottime() - self._incarnation.lease.ticked_at - self.settings.renew

    def unready(self) -> str | None:
        """See ``Pulse.unready``."""
        if self._incarnation is None:
            return "joining"
        lease = self._incarnation.lease
        if lease.state is LeaseState.SUSPENDED and lease.suspended_for < self.settings.hold:
            return None
        return None if lease.trusted else str(lease.state)


class _HttpServer(uvicorn.Server):
    """uvicorn, but streams are told to end before it waits for them."""

    def __init__(self, config: uvicorn.Config, before_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._before_exit = before_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        asyncio.get_running_loop().call_soon_threadsafe(self._before_exit)
        super().handle_exit(sig, frame)


def shared_socket(settings: Settings) -> socket.socket:
    """A socket on the node's port that other processes may share (SO_REUSEPORT).

    Raises:
        SettingsError: somebody else has the port for himself.
    """
    shared = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        shared.bind((settings.host, settings.port))
    except OSError as error:
        shared.close()
        message = f"Port {settings.port} of {settings.host} cannot be used ({error.strerror}); choose another --port."
        raise SettingsError(message) from error
    return shared


def serve(settings: Settings, target: str, *, shared_port: bool = False) -> int:
    """Run one node in this process until SIGTERM or SIGINT.

    Args:
        settings: the node's settings.
        target: ``module:attribute`` or ``path/to/file.py:attribute``.
        shared_port: listen beside other processes on the port (SO_REUSEPORT).

    Returns:
        The process's exit code: 0 after an orderly stop.

    Raises:
        PgmcpError: the node cannot start; the message says why and what to do.
    """
    served = load(target)
    configure(settings.log_format)  # after the target, which may have had ideas of its own
    node = Node(settings, served)
    config = uvicorn.Config(
        node.application(),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_config=None,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=5,
    )
    server = _HttpServer(config, node.stop_streams)
    logging.getLogger("uvicorn.error").addFilter(lambda _: node.failure is None)  # it is said below, in one line
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        server.run(sockets=[shared_socket(settings)] if shared_port else None)
    if node.failure is not None:
        raise node.failure
    return 0 if server.started else 1
