"""What every endpoint does before it answers: Host and Origin, method, the body's limits; and how errors are said.

Who is asking was found out before: the served server's authentication stands in front. So a stranger's body is not
read, and nobody's is before there is room for it (``Bodies``).

Failure handling, where an exchange belongs to a session: a database that is away holds it (``hold``, ``resume_hold``),
then it is 503 with ``Retry-After``; so it is on a node that has no trust yet or lost its incarnation.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID

from mcp.server.transport_security import TransportSecurityMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from pgmcp.errors import (
    ClusterFull,
    DatabaseUnavailable,
    DuplicateRequest,
    Fenced,
    NodeFull,
    NodeNotReady,
    PgmcpError,
    SessionBusy,
    SessionUnknown,
    StreamTaken,
    TooManySessions,
)
from pgmcp.protocol import INTERNAL_ERROR, INVALID_REQUEST
from pgmcp.settings import Settings
from pgmcp.types import StreamId
from pgmcp.web.bodies import Bodies, Body
from pgmcp.web.connection import connection_of
from pgmcp.web.edge import Edge
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_rpc import Refusal
from pgmcp.web.rates import Rates

logger = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[PgmcpError], int, int], ...] = (
    (SessionUnknown, 404, INVALID_REQUEST),
    (DuplicateRequest, 400, INVALID_REQUEST),
    (StreamTaken, 409, INVALID_REQUEST),
    (SessionBusy, 429, INVALID_REQUEST),
    (TooManySessions, 429, INVALID_REQUEST),
    (ClusterFull, 503, INTERNAL_ERROR),
    (NodeFull, 503, INTERNAL_ERROR),
    (DatabaseUnavailable, 503, INTERNAL_ERROR),
    (NodeNotReady, 503, INTERNAL_ERROR),
    (Fenced, 503, INTERNAL_ERROR),
)


@dataclass(frozen=True, slots=True)
class Rules:
    """By what a node decides whom and what it lets in, at every endpoint.

    ``security`` is for Host and Origin, ``bodies`` the room for bodies, ``rates`` how much a caller may ask for.
    """

    security: TransportSecurityMiddleware
    bodies: Bodies
    rates: Rates
    settings: Settings


class Front(ABC):
    """An ASGI application for one path, behind ``Bounded``."""

    methods: tuple[str, ...] = ()
    """What it answers; empty: whoever answers says."""

    def __init__(self, rules: Rules) -> None:
        self._security, self._bodies = rules.security, rules.bodies
        self._rates, self._settings = rules.rates, rules.settings

    @abstractmethod
    async def take(self, exchange: HttpExchange, body: Body) -> None:
        """Answer an exchange whose Host, Origin, method and length are in order.

        Raises:
            Refusal: something is wrong with it.
            PgmcpError: it cannot be answered, or not now.
        """

    def opens(self, exchange: HttpExchange) -> bool:
        """Whether an exchange asks for a session of its own, by its headers."""
        del exchange
        return False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one exchange."""
        exchange = HttpExchange(Request(scope, receive), connection_of(scope), bind_to=self._settings.bind_to)
        try:
            await self._checked(exchange)
        except ClientDisconnect:
            logger.debug("a client went before it had sent its whole body")
        except (Refusal, PgmcpError) as error:
            if exchange.connection.started:
                raise
            await exchange.refuse(_refusal(error))
        except asyncio.CancelledError:
            if not exchange.connection.started:  # the HTTP server stops before its exchanges do, and would say 500
                await exchange.refuse(_refusal(NodeNotReady("This node has stopped; send the same message again.")))
            raise

    async def _checked(self, exchange: HttpExchange) -> None:
        request, limits = exchange.request, self._settings
        problem = await self._security.validate_request(request, is_post=request.method == "POST")
        if problem is not None:
            await exchange.send_response(problem)
            return
        if self.methods and request.method not in self.methods:
            raise Refusal(405, "Method Not Allowed", headers={"allow": ", ".join(self.methods)})
        if request.method == "POST":
            self._rates.post(exchange.caller)
        if self.opens(exchange):
            self._rates.opening(exchange)
        with self._bodies.body(exchange.caller) as body:
            try:
                if request.method == "POST":
                    await exchange.read(body, limits.max_body, limits.read_timeout)
                await self.take(exchange, body)
            except (DatabaseUnavailable, Fenced, NodeNotReady):
                raise  # nothing is wrong with the body
            except (Refusal, PgmcpError):
                await body.refused()
                raise


class Endpoint(Front):
    """A path whose exchanges belong to sessions.

    Args:
        edge: the node's present incarnation; raises ``NodeNotReady`` while there is none.
        rules: whom and what it lets in.
    """

    def __init__(self, edge: Callable[[], Edge], rules: Rules) -> None:
        super().__init__(rules)
        self._edge = edge

    @abstractmethod
    async def answer(self, edge: Edge, exchange: HttpExchange, body: Body) -> None:
        """Answer an exchange that passed the checks.

        Raises:
            Refusal: something is wrong with it.
            PgmcpError: it cannot be answered, or not now.
        """

    async def take(self, exchange: HttpExchange, body: Body) -> None:
        """See ``Front.take``."""
        edge = self._edge()
        exchange = replace(exchange, arrived=edge.clock.boottime() - exchange.connection.silent)
        if not await edge.lease.trusted_within(self._settings.hold):
            message = "This node has lost touch with the cluster; try again or ask another one."
            raise NodeNotReady(message)
        await self.answer(edge, exchange, body)


def cursor(last_event_id: str) -> tuple[StreamId, int]:
    """Stream and place that a ``Last-Event-ID`` names.

    Raises:
        Refusal: 400, it is not one of ours.
    """
    stream, dot, seq = last_event_id.partition(".")
    try:
        if dot and seq.isascii() and seq.isdigit() and len(seq) < 19:
            return StreamId(UUID(hex=stream)), int(seq)
    except ValueError:
        pass
    raise Refusal(400, "Last-Event-ID is not an event id of this server")


def _refusal(error: Refusal | PgmcpError) -> Refusal:
    if isinstance(error, Refusal):
        return error
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return Refusal(status, str(error), code, {"retry-after": "1"} if status in {429, 503} else None)
    logger.error("an exchange failed: %s", error)
    return Refusal(500, "Internal error; look at the node's log.", INTERNAL_ERROR)
