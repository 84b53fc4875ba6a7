"""One node: builds its parts and starts and stops them in order.

A node lives through one or more incarnations, over the same pool and the same served server: when the cluster has
declared one dead, the node joins again as a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from starlette.types import ASGIApp, Receive, Scope, Send

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.drain import PAUSE_SECONDS
from pgmcp.cluster.lease import LeaseState
from pgmcp.errors import NodeNotReady, PgmcpError, SettingsError
from pgmcp.node import first_connection, lifespan
from pgmcp.node.incarnation import Incarnation
from pgmcp.node.own_name import named
from pgmcp.node.signals import Signals
from pgmcp.node.supervisor import REJOIN_SECONDS, Supervisor
from pgmcp.node.watchdog import Watchdog, watched
from pgmcp.ops.access_log import AccessLog
from pgmcp.ops.health import health_routes
from pgmcp.ops.logs import mask_session_ids
from pgmcp.service import Faults, Periodic, Service, failure
from pgmcp.session.adapter import Shared
from pgmcp.session.target import middleware, target_of
from pgmcp.settings import Settings, unknown_variables
from pgmcp.store.database import Database
from pgmcp.store.encryption.key_rings import CONTEXTS, REFRESH_SECONDS, KeyRing, StateRing
from pgmcp.store.encryption.key_wrapping import wrapping_of
from pgmcp.store.encryption.payloads import Payloads
from pgmcp.store.publications import TablePublications
from pgmcp.trouble import Trouble
from pgmcp.types import Publication
from pgmcp.web.admission import Admission
from pgmcp.web.application import Application
from pgmcp.web.bodies import Bodies
from pgmcp.web.connection import Bounded
from pgmcp.web.connection_close import ConnectionClose
from pgmcp.web.cross_origin import cross_origin
from pgmcp.web.edge import Edge
from pgmcp.web.endpoint import Rules
from pgmcp.web.eras import EraOff, Eras
from pgmcp.web.hosts import host_rules, unprotected
from pgmcp.web.legacy import SseMessages, SseStream
from pgmcp.web.modern import Modern
from pgmcp.web.rates import Rates
from pgmcp.web.reserved_headers import ReservedHeaders
from pgmcp.web.streamable import Streamable

logger = logging.getLogger(__name__)


class Node:
    """One node: database, served server, present incarnation.

    Args:
        settings: the node's settings.
        served: an MCP server object that an adapter knows.
    """

    def __init__(
        self, settings: Settings, served: object, *, clock: Clock | None = None, ids: Ids | None = None
    ) -> None:
        for unknown in unknown_variables(os.environ):
            logger.warning("a variable that nobody reads: %s", unknown)
        if not settings.database_url:
            message = (
                "No database given. Set --database-url or PGMCP_DATABASE_URL to postgresql://user:password@host/db."
            )
            raise SettingsError(message)
        settings, self._give_up_name = named(settings, self)
        self.settings, self._clock, self._ids = settings, clock or Clock(), ids or Ids()
        self.database = Database(settings, self._clock, self._ids)
        wrapping = wrapping_of(settings)
        self.box = KeyRing(self.database, CONTEXTS, wrapping)
        self.states = StateRing(self.database, wrapping, self._ids)
        self._payloads = Payloads.of(self.database, wrapping)
        self._publications = TablePublications(self.database, self._clock, self._ids)
        self.target = target_of(served, settings.mcp_path)
        self._middleware = [middleware(name) for name in settings.middleware]
        self._admission = Admission(self._clock)
        self.bodies = Bodies(settings.max_body, self._clock)
        self._rules = Rules(host_rules(settings), self.bodies, Rates(settings, self._clock), settings)
        self.modern = Modern(self._stateless, self._admission, self._rules, self._clock)
        self._revision, self._started = "", False
        self._keys_trouble = Trouble("reading the cluster's keys", self._clock)
        self.draining = False
        """Whether it leaves for good: no incarnation follows the present one."""
        self.faults = Faults()
        self.watchdog: Watchdog | None = None
        self.supervisor = Supervisor(self._new_incarnation, self._clock, self.faults, lambda: self.draining)
        self.failure: PgmcpError | None = None
        self.shut: Callable[[], Awaitable[None]] = _nothing
        """Closes the port on which the node is served, when it has drained; set by whoever runs the HTTP server."""

    def endpoints(self) -> dict[str, ASGIApp]:
        """The node's MCP endpoints by their paths, behind the served server's authentication."""
        messages = self.settings.messages_path

        def edge() -> Edge:
            return self.incarnation().edge

        if "legacy" not in self.settings.eras:
            endpoints: dict[str, ASGIApp] = {
                self.settings.mcp_path: Eras(self.modern, EraOff(self._rules, legacy=False))
            }
        else:
            modern = self.modern if "modern" in self.settings.eras else EraOff(self._rules, legacy=True)
            endpoints = {
                self.settings.mcp_path: Eras(modern, Streamable(edge, self._rules)),
                self.settings.sse_path: SseStream(edge, self._rules, messages=messages),
                messages.rstrip("/"): SseMessages(edge, self._rules),
            }
        return {path: ReservedHeaders(self.target.protect(endpoint)) for path, endpoint in endpoints.items()}

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
        return Application(
            self.endpoints(), self.target.routes, litestar, self.running, self.wrapped, lambda: self.failure
        )

    def wrapped(self, app: ASGIApp) -> ASGIApp:
        """An application whose clients read in time and part while the node drains, logged if that is wanted.

        The operator's middleware sees what clients send and are sent; the pages of other origins are let in before it.
        """
        bounded: ASGIApp = Bounded(app, self.settings.write_timeout)
        for wrap in reversed(self._middleware):
            bounded = wrap(bounded)
        closing = ConnectionClose(cross_origin(bounded, self.settings), lambda: self.draining)
        return AccessLog(closing, self._clock) if self.settings.access_log else closing

    def incarnation(self) -> Incarnation:
        """The present incarnation.

        Raises:
            NodeNotReady: the node is joining or leaving.
        """
        self._check_started()
        if self.supervisor.present is None:
            message = "This node is not part of the cluster now; try again or ask another one."
            raise NodeNotReady(message)
        return self.supervisor.present

    async def _stateless(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an exchange without a session, in whatever state the node is in the cluster."""
        self._check_started()
        await self.target.adapter.answer(scope, receive, send)

    def _check_started(self) -> None:
        if not self._started:
            message = (
                "The lifespan of pgmcp's application was not run, so it is not part of the cluster. When you mount it, "
                "run it from yours: lifespan=lambda _: app.lifespan()."
            )
            raise NodeNotReady(message)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the node: check the schema, join, keep a live incarnation, leave.

        Raises:
            DatabaseUnavailable: PostgreSQL could not be reached for as long as the node waits at its start.
            LifespanFailed: the served server's own start failed.
            SchemaError: the schema is not one that this build understands.
            OtherServer: the cluster serves something else.
        """
        self._started = True
        mask_session_ids()  # whoever runs the HTTP server
        if warning := unprotected(self.settings):
            logger.warning("open to everybody: %s", warning)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._give_up_name)
            try:
                await self._start(stack)
            except PgmcpError as error:
                self.failure = error
                raise error.with_traceback(None) from None  # the message says it all, whoever prints the trace
            stack.enter_context(Signals(self.drain, self.stop_streams))
            yield

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """Start the node's services in order; the stack stops them in reverse."""
        self.watchdog = stack.enter_context(watched(self._clock))
        stack.callback(self.target.bus.attach(self._publish))
        stack.push_async_callback(self.database.close)
        self._revision = await first_connection.connect(self.database, self._clock, self.settings.wait)
        for ring in (self.box, self.states, self._payloads):
            await ring.load()
        shared = Shared(self.states, self.settings.single_use_states, json_only=self.settings.response == "json")
        await stack.enter_async_context(lifespan.running(self.target.adapter.lifespan(shared)))
        await self.supervisor.start()
        stack.push_async_callback(self.supervisor.stop)
        services: dict[str, Service] = {
            "the supervisor": self.supervisor,
            "the look for commands": Periodic(
                self.settings.poll, self._obey, self._clock, self._ids, allowed=self._calm
            ),
            "the look for keys": Periodic(REFRESH_SECONDS, self._refresh, self._clock, self._ids, allowed=self._calm),
        }
        tasks = [asyncio.create_task(self._begun_again(*each), name=each[0]) for each in services.items()]
        stack.push_async_callback(asyncio.wait, tasks)
        for task in tasks:
            stack.callback(task.cancel)

    async def _begun_again(self, duty: str, service: Service) -> None:
        while (error := await failure(service)) is not None:
            self.faults.note(duty, error)
            await self._clock.sleep(REJOIN_SECONDS)

    def _calm(self) -> bool:
        """Whether PostgreSQL is known not to be away."""
        return self.supervisor.present is None or self.supervisor.present.lease.trusted

    def _new_incarnation(self) -> Incarnation:
        return Incarnation(
            self.settings,
            self.database,
            self.box,
            self._payloads,
            self.target.adapter,
            self._admission,
            self._publications,
            self.target.bus,
            self._clock,
            self._ids,
            revision=self._revision,
            serves=self.settings.cluster or self.target.name,
            faults=self.faults,
            busy=lambda: self.modern.busy,
        )

    async def _publish(self, publication: Publication) -> None:
        """Store a publication and wake every node; what is stored and wakes nobody is found by their next poll."""
        await self._publications.publish(publication)
        if self.supervisor.present is not None:
            self.supervisor.present.wakeups.published()

    async def _refresh(self) -> None:
        """Read the key rings anew."""
        failed: PgmcpError | None = None
        for ring in (self.box, self.states, self._payloads):
            try:
                await ring.load()
            except PgmcpError as error:
                failed = error
        if failed is None:
            self._keys_trouble.over()
        else:
            self._keys_trouble.met(failed)

    async def drain(self) -> None:
        """Leave in an orderly way (G10): unready, then nobody's owner, then nobody's edge.

        It serves on until balancers have noticed; only then streams end and sessions go.
        """
        self.draining = True
        logger.info("node %s drains", self.settings.node_name)
        if self.supervisor.present is not None:
            await self.supervisor.present.announce()
        await self._clock.sleep(self.settings.drain_notice)
        self.target.adapter.end_streams()
        if self.supervisor.present is not None:
            await self.supervisor.present.drain(self.shut)
        else:
            await self._finish()
        self.target.adapter.end_streams()  # those that began since
        logger.info("node %s has drained", self.settings.node_name)

    async def _finish(self) -> None:
        """Finish what is answered without a session; the node is not part of the cluster, and owns nothing."""
        end = self._clock.boottime() + self.settings.drain_limit
        while self.modern.busy and self._clock.boottime() < end:
            await self._clock.sleep(PAUSE_SECONDS)

    def stop_streams(self) -> None:
        """End every exchange at once with its final chunk, so that the HTTP server can stop."""
        self.target.adapter.end_streams()
        self.modern.cut()
        if self.supervisor.present is not None:
            self.supervisor.present.edge.leave(at_once=True)

    async def _obey(self) -> None:
        """Obey an operator who wrote into the node's row that it should leave."""
        present = self.supervisor.present
        if present is not None and not self.draining and await present.asked_to_drain():
            signal.raise_signal(signal.SIGTERM)

    def stalled(self) -> float:
        """See ``Pulse.stalled``."""
        if self.supervisor.present is None:
            return 0.0
        return self._clock.boottime() - self.supervisor.present.lease.ticked_at - self.settings.renew

    def failing(self) -> bool:
        """See ``Pulse.failing``."""
        return self.supervisor.failing

    def unready(self) -> str | None:
        """See ``Pulse.unready``."""
        if self.draining:
            return "draining"
        if self.supervisor.present is None:
            return self.supervisor.absent
        lease = self.supervisor.present.lease
        if self.supervisor.present.outgrown or lease.schema_gone:
            return "schema"
        if lease.state is LeaseState.SUSPENDED and lease.suspended_for < self.settings.hold:
            return None
        return None if lease.trusted else str(lease.state)


async def _nothing() -> None:
    return None
