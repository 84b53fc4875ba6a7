"""The Streamable HTTP endpoint for the handshake revisions (2025-03-26, 2025-06-18, 2025-11-25).

Any node answers any exchange: it authenticates and checks where the exchange arrives, stores what the client said,
wakes the owner, and carries the streams from the log.

Invariants:
- 202, a session id, a priming event and an event are sent after what they promise is committed (G2).
- 404 means: this session is over, was never there, or is somebody else's - and nothing else (G6, G7).
- Whatever is wrong with a message is said before anything is stored.

Failure handling: a database that is away holds the exchange (``hold``, ``resume_hold``), then it is 503 with
``Retry-After``; so it is on a node that has no trust yet or lost its incarnation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from uuid import UUID

from mcp.server.transport_security import TransportSecurityMiddleware
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from pgmcp.errors import DatabaseUnavailable, DuplicateRequest, Fenced, NodeNotReady, PgmcpError, SessionUnknown
from pgmcp.settings import Settings
from pgmcp.types import Attachment, StreamId
from pgmcp.web.call import LAST_EVENT_ID, VERSION, Call
from pgmcp.web.edge import Edge
from pgmcp.web.posting import Posting
from pgmcp.web.wire import INTERNAL_ERROR, INVALID_REQUEST, Refusal, accepts

logger = logging.getLogger(__name__)

METHODS = "GET, POST, DELETE"
_STATUS: tuple[tuple[type[PgmcpError], int, int], ...] = (
    (SessionUnknown, 404, INVALID_REQUEST),
    (DuplicateRequest, 400, INVALID_REQUEST),
    (DatabaseUnavailable, 503, INTERNAL_ERROR),
    (NodeNotReady, 503, INTERNAL_ERROR),
    (Fenced, 503, INTERNAL_ERROR),
)


class Streamable:
    """The endpoint as an ASGI application.

    Args:
        edge: the node's present incarnation; raises ``NodeNotReady`` while there is none.
        security: Host and Origin rules.
        settings: the node's settings.
    """

    def __init__(self, edge: Callable[[], Edge], *, security: TransportSecurityMiddleware, settings: Settings) -> None:
        self._edge, self._security, self._settings = edge, security, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one exchange."""
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        call = Call(Request(scope, receive), receive, noting)
        try:
            await self._answer(call)
        except (Refusal, PgmcpError) as error:
            if started:
                raise
            await call.refuse(_refusal(error))

    async def _answer(self, call: Call) -> None:
        request = call.request
        if request.scope["path"].strip("/"):
            raise Refusal(404, "There is nothing here; the endpoint is one level up")
        body = await call.body(self._settings.max_body) if request.method == "POST" else b""
        problem = await self._security.validate_request(request, is_post=request.method == "POST")
        if problem is not None:
            await call.send_response(problem)
            return
        version = call.header(VERSION)
        if version and version not in HANDSHAKE_PROTOCOL_VERSIONS:
            served = ", ".join(HANDSHAKE_PROTOCOL_VERSIONS)
            text = f"Bad Request: protocol version {version[:40]!r} is not served here; use one of {served}"
            raise Refusal(400, text)
        edge = self._edge()
        if not await edge.lease.trusted_within(self._settings.hold):
            message = "This node has lost touch with the cluster; try again or ask another one."
            raise NodeNotReady(message)
        match request.method:
            case "POST":
                await Posting(edge, call).answer(body)
            case "GET":
                await _get(edge, call)
            case "DELETE":
                edge.wakeups.ended(await edge.inbox.end(call.session_id, call.principal))
                await call.respond(200)
            case _:
                raise Refusal(405, "Method Not Allowed", headers={"allow": METHODS})


async def _get(edge: Edge, call: Call) -> None:
    """Carry the standalone stream, or resume any stream after ``Last-Event-ID``."""
    if not accepts(call.request)[1]:
        raise Refusal(406, "Not Acceptable: Client must accept text/event-stream")
    session_id, last = call.session_id, call.header(LAST_EVENT_ID)
    stream, after = _cursor(last) if last else (None, None)
    attached = await edge.attach(call, session_id, stream)
    if not isinstance(attached, Attachment):
        await call.respond(204)
        return
    if after is None:
        after = attached.delivered_seq
    with edge.tails.subscribe(attached.stream) as tail:
        facts = attached.facts
        exchange = edge.exchange(
            call,
            tail,
            facts.session,
            session_id,
            facts.protocol_version,
            sink_epoch=attached.sink_epoch,
            after=after,
            kind=attached.kind,
        )
        try:
            if after < attached.floor_seq or (attached.closed and after >= attached.next_seq - 1):
                await call.respond(204)  # pruned, or finished and delivered: an empty 200 would make clients loop
            else:
                await exchange.stream(look=True)
        finally:
            await exchange.release()


def _cursor(last_event_id: str) -> tuple[StreamId, int]:
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
            return Refusal(status, str(error), code, {"retry-after": "1"} if status == 503 else None)
    logger.error("an exchange failed: %s", error)
    return Refusal(500, "Internal error; look at the node's log.", INTERNAL_ERROR)
