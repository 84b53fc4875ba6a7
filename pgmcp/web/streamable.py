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
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from mcp.server.transport_security import TransportSecurityMiddleware
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, is_version_at_least
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.lease import Lease
from pgmcp.cluster.wakeups import Wakeups
from pgmcp.errors import DatabaseUnavailable, DuplicateRequest, Fenced, NodeNotReady, PgmcpError, SessionUnknown
from pgmcp.ports import Inbox, Log, SecretBox
from pgmcp.session.adapter import Adapter
from pgmcp.session.caller import Caller, place
from pgmcp.session.host import Host
from pgmcp.settings import Settings
from pgmcp.types import (
    ANONYMOUS,
    Accepted,
    Attachment,
    Message,
    NewSession,
    Principal,
    RequestKey,
    StreamId,
    StreamKind,
)
from pgmcp.web.exchange import Exchange
from pgmcp.web.tails import Tail, Tails
from pgmcp.web.wire import INTERNAL_ERROR, INVALID_REQUEST, Parsed, Post, Refusal, accepts, parse_post

logger = logging.getLogger(__name__)

SESSION_ID, LAST_EVENT_ID, VERSION = "mcp-session-id", "last-event-id", "mcp-protocol-version"
BATCHES = "2025-03-26"
PRIMES = "2025-11-25"
METHODS = "GET, POST, DELETE"
_STATUS: tuple[tuple[type[PgmcpError], int, int], ...] = (
    (SessionUnknown, 404, INVALID_REQUEST),
    (DuplicateRequest, 400, INVALID_REQUEST),
    (DatabaseUnavailable, 503, INTERNAL_ERROR),
    (NodeNotReady, 503, INTERNAL_ERROR),
    (Fenced, 503, INTERNAL_ERROR),
)


@dataclass(frozen=True, slots=True)
class Edge:
    """What the endpoint needs of the node's present incarnation."""

    inbox: Inbox
    log: Log
    lease: Lease
    wakeups: Wakeups
    tails: Tails
    host: Host


class Streamable:
    """The endpoint as an ASGI application; identity, if any, was put into the scope before it.

    Args:
        edge: the node's present incarnation; raises ``NodeNotReady`` while there is none.
        security: Host and Origin rules.
    """

    def __init__(
        self,
        edge: Callable[[], Edge],
        *,
        adapter: Adapter,
        box: SecretBox,
        settings: Settings,
        security: TransportSecurityMiddleware,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._edge, self._adapter, self._box = edge, adapter, box
        self._settings, self._security, self._clock, self._ids = settings, security, clock, ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one exchange."""
        request = Request(scope, receive)
        started = False

        async def noting(message: object) -> None:
            nonlocal started
            started = True
            await send(message)  # type: ignore[arg-type]

        try:
            await self._answer(request, receive, noting)
        except (Refusal, PgmcpError) as error:
            if started:
                raise
            await _respond(_refusal(error), scope, receive, send)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        body = await self._body(request) if request.method == "POST" else b""
        problem = await self._security.validate_request(request, is_post=request.method == "POST")
        if problem is not None:
            await problem(request.scope, receive, send)
            return
        version = request.headers.get(VERSION, "").strip()
        if version and version not in HANDSHAKE_PROTOCOL_VERSIONS:
            served = ", ".join(HANDSHAKE_PROTOCOL_VERSIONS)
            text = f"Bad Request: protocol version {version[:40]!r} is not served here; use one of {served}"
            raise Refusal(400, text)
        match request.method:
            case "POST":
                await _Posting(self, request, receive, send).answer(body)
            case "GET":
                await self._get(request, receive, send)
            case "DELETE":
                await self._delete(request, send)
            case _:
                raise Refusal(405, "Method Not Allowed", headers={"allow": METHODS})

    async def _body(self, request: Request) -> bytes:
        limit = self._settings.max_body
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise Refusal(413, f"The body has more than {limit} bytes")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise Refusal(413, f"The body has more than {limit} bytes")
        return bytes(body)

    async def _get(self, request: Request, receive: Receive, send: Send) -> None:
        if not accepts(request)[1]:
            raise Refusal(406, "Not Acceptable: Client must accept text/event-stream")
        session_id, edge = session_of(request), self._edge()
        last = request.headers.get(LAST_EVENT_ID, "").strip()
        stream, after = _cursor(last) if last else (None, None)
        attached = await edge.log.attach(session_id, principal_of(request), stream)
        if not isinstance(attached, Attachment):
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})
            return
        if after is None:
            after = attached.delivered_seq
        await self._carry_attached(edge, attached, after, request, receive, send)

    async def _carry_attached(
        self, edge: Edge, attached: Attachment, after: int, request: Request, receive: Receive, send: Send
    ) -> None:
        if attached.replaced is not None:
            edge.wakeups.stream(attached.replaced, attached.stream)
        with edge.tails.subscribe(attached.stream) as tail:
            tail.session = attached.facts.session
            exchange = self.exchange(
                edge,
                tail,
                attached.sink_epoch,
                after,
                attached.kind,
                version=attached.facts.protocol_version,
                session_id=session_of(request),
                receive=receive,
                send=send,
            )
            try:
                if after < attached.floor_seq or (attached.closed and after >= attached.next_seq - 1):
                    await send({"type": "http.response.start", "status": 204, "headers": []})
                    await send({"type": "http.response.body"})
                else:
                    await exchange.stream(look=True)
            finally:
                await exchange.release()

    async def _delete(self, request: Request, send: Send) -> None:
        edge = self._edge()
        ended = await edge.inbox.end(session_of(request), principal_of(request))
        edge.wakeups.ended(ended)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    def exchange(
        self,
        edge: Edge,
        tail: Tail,
        sink_epoch: int,
        after: int,
        kind: StreamKind,
        *,
        version: str | None,
        session_id: str,
        receive: Receive,
        send: Send,
    ) -> Exchange:
        """An exchange for a stream that this edge carries."""
        return Exchange(
            tail,
            sink_epoch,
            after,
            kind,
            log=edge.log,
            lease=edge.lease,
            settings=self._settings,
            clock=self._clock,
            receive=receive,
            send=send,
            priming=version is not None and is_version_at_least(version, PRIMES),
            headers={SESSION_ID: session_id},
        )

    async def accept(
        self, edge: Edge, post: Post, request: Request, session_id: str, stream: StreamId | None
    ) -> Accepted:
        """Store a POST's messages and wake the owner."""
        caller = Caller(self._adapter.describe(request.scope), can_ask=self._settings.response != "json").pack()
        who = principal_of(request)
        messages = []
        for message in post.messages:
            key = RequestKey(self._ids.uuid())
            messages.append(
                Message(
                    key=key,
                    session_id=session_id,
                    principal=who,
                    rpc_id=message.rpc_id,
                    method=message.method,
                    name=message.name,
                    body=message.body,
                    context=self._box.seal(caller, place(session_id, key)),
                    stream=stream if message.rpc_id is not None else None,
                )
            )
        accepted = await edge.inbox.accept(messages)
        if not accepted.joined:
            edge.wakeups.inbox(accepted.facts.owner, accepted.facts.session)
        return accepted

    def current(self) -> Edge:
        """The node's present incarnation."""
        return self._edge()

    @property
    def settings(self) -> Settings:
        """The node's settings."""
        return self._settings

    def new_session(self, request: Request) -> NewSession:
        """A session that this node is about to own; its id hints at the node and is unguessable."""
        return NewSession(
            session_id=f"{self._settings.node_name}-{self._ids.token()}",
            principal=principal_of(request),
            transport="streamable",
            standalone=StreamId(self._ids.uuid()),
        )

    def new_stream(self) -> StreamId:
        """An id for a request's stream."""
        return StreamId(self._ids.uuid())


class _Posting:
    """One POST on its way through the endpoint."""

    def __init__(self, endpoint: Streamable, request: Request, receive: Receive, send: Send) -> None:
        self._endpoint, self._request, self._receive, self._send = endpoint, request, receive, send
        self._edge = endpoint.current()

    async def answer(self, body: bytes) -> None:
        json_ok, sse_ok = accepts(self._request)
        response = self._endpoint.settings.response
        if not json_ok or not (sse_ok or response == "json"):
            wanted = "application/json" + ("" if response == "json" else " and text/event-stream")
            raise Refusal(406, f"Not Acceptable: Client must accept {wanted}")
        post = parse_post(body, self._endpoint.settings.max_batch)
        if post.initialize is not None:
            await self._initialize(post, post.initialize)
            return
        session_id = session_of(self._request)
        if post.batch:
            await self._check_batch(session_id)
        if not post.requests:
            await self._endpoint.accept(self._edge, post, self._request, session_id, None)
            await _respond(Response(status_code=202), self._request.scope, self._receive, self._send)
            return
        await self._requests(post, session_id)

    async def _check_batch(self, session_id: str) -> None:
        facts = await self._edge.inbox.find(session_id, principal_of(self._request))
        if facts.protocol_version != BATCHES:
            raise Refusal(400, f"Batches belong to {BATCHES}, this session speaks {facts.protocol_version}")

    async def _requests(self, post: Post, session_id: str) -> None:
        stream = self._endpoint.new_stream()
        with self._edge.tails.subscribe(stream) as tail:
            accepted = await self._endpoint.accept(self._edge, post, self._request, session_id, stream)
            tail.session = accepted.facts.session
            if not accepted.joined:
                await self._carry(tail, accepted, session_id, batch=post.batch)
                return
        await self._join(accepted, session_id)

    async def _carry(self, tail: Tail, accepted: Accepted, session_id: str, *, batch: bool) -> None:
        exchange = self._exchange(tail, 1, accepted.facts.protocol_version, session_id)
        try:
            match self._endpoint.settings.response:
                case "json":
                    await exchange.answer_json(batch=batch)
                case "auto":
                    await exchange.answer_auto(batch=batch)
                case _:
                    await exchange.stream()
        finally:
            await exchange.release()

    async def _join(self, accepted: Accepted, session_id: str) -> None:
        """The same request is there already: carry its stream from the start, instead of whoever carried it."""
        attached = await self._edge.log.attach(session_id, principal_of(self._request), accepted.stream)
        if not isinstance(attached, Attachment):
            raise Refusal(409, "The request that has this id was just answered elsewhere; use another id")
        if attached.replaced is not None:
            self._edge.wakeups.stream(attached.replaced, attached.stream)
        with self._edge.tails.subscribe(attached.stream) as tail:
            tail.session = attached.facts.session
            tail.moved.set()
            exchange = self._exchange(tail, attached.sink_epoch, attached.facts.protocol_version, session_id)
            try:
                if self._endpoint.settings.response == "json":
                    await exchange.answer_json(batch=False)
                else:
                    await exchange.stream(look=True)
            finally:
                await exchange.release()

    def _exchange(self, tail: Tail, sink_epoch: int, version: str | None, session_id: str) -> Exchange:
        return self._endpoint.exchange(
            self._edge,
            tail,
            sink_epoch,
            0,
            StreamKind.REQUEST,
            version=version,
            session_id=session_id,
            receive=self._receive,
            send=self._send,
        )

    async def _initialize(self, post: Post, message: Parsed) -> None:
        """Open a session here; its client hears of it when the handshake has succeeded and is stored."""
        if SESSION_ID in self._request.headers:
            await self._edge.inbox.find(session_of(self._request), principal_of(self._request))
            raise Refusal(400, "This session is initialized already; send initialize without a session id for another")
        asked = (message.params or {}).get("protocolVersion")
        new, stream = self._endpoint.new_session(self._request), self._endpoint.new_stream()
        await self._edge.lease.acting()
        ownership = await self._edge.host.open(new)
        established = False
        try:
            with self._edge.tails.subscribe(stream) as tail:
                tail.session = ownership.session
                await self._endpoint.accept(self._edge, post, self._request, new.session_id, stream)
                exchange = self._exchange(tail, 1, asked if isinstance(asked, str) else None, new.session_id)
                try:
                    page = await exchange.handshake()
                    established = True
                    if self._endpoint.settings.response == "sse":
                        await exchange.stream(first=page)
                    else:
                        await exchange.send_json(page.events, batch=False)
                finally:
                    await exchange.release()
        finally:
            if not established:
                with suppress(PgmcpError):
                    self._edge.wakeups.ended(await self._edge.inbox.end(new.session_id, new.principal))


def session_of(request: Request) -> str:
    """The session that an exchange belongs to.

    Raises:
        Refusal: 400 without one; 404 for what can be nobody's id.
    """
    session_id = request.headers.get(SESSION_ID)
    if not session_id:
        raise Refusal(400, "Bad Request: Missing session ID")
    if not all("!" <= char <= "~" for char in session_id):
        raise Refusal(404, "Session not found")
    return session_id


def principal_of(request: Request) -> Principal:
    """Who is asking, as the SDK's authentication found out."""
    user = request.scope.get("user")
    if not isinstance(user, AuthenticatedUser):
        return ANONYMOUS
    found = authorization_context(user)
    return Principal(found["client_id"], found["issuer"], found["subject"])


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


async def _respond(answer: Refusal | Response, scope: Scope, receive: Receive, send: Send) -> None:
    if isinstance(answer, Refusal):
        answer = Response(answer.body, answer.status, answer.headers, "application/json")
    await answer(scope, receive, send)
