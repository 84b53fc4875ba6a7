"""The edge: what any endpoint needs of the node's present incarnation to take messages and to carry streams."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.lease import Lease
from pgmcp.cluster.takeover import Takeover
from pgmcp.cluster.wakeups import Wakeups
from pgmcp.ports import Inbox, Log
from pgmcp.protocol import SESSION_ID_HEADER, revision_of
from pgmcp.secret_box import SecretBox
from pgmcp.session.adapter import Adapter
from pgmcp.session.host import Host
from pgmcp.session.request_context import RequestContext, place_of_context
from pgmcp.settings import Settings
from pgmcp.types import (
    Accepted,
    Attachment,
    Message,
    NewSession,
    NodeId,
    RequestKey,
    SessionFacts,
    StreamId,
    StreamKind,
)
from pgmcp.web.admission import Admission, Kind
from pgmcp.web.bodies import Body
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_limits import json_limits_of
from pgmcp.web.json_rpc import Post, parse_post
from pgmcp.web.open_streams import OpenStream, OpenStreams
from pgmcp.web.stream_response import StreamResponse
from pgmcp.web.token_expiry import TokenExpiry


async def _nothing() -> Sequence[bytes]:
    return ()


@dataclass(frozen=True, slots=True)
class Edge:
    """One incarnation, as endpoints see it."""

    node: NodeId
    inbox: Inbox
    log: Log
    lease: Lease
    wakeups: Wakeups
    takeover: Takeover
    open_streams: OpenStreams
    admission: Admission
    host: Host
    adapter: Adapter
    box: SecretBox
    settings: Settings
    clock: Clock
    ids: Ids
    term: Callable[[], int]
    """The term of the database's timeline."""

    def new_session(self, exchange: HttpExchange, transport: str) -> NewSession:
        """A session that this node is about to own; its id hints at the node and is unguessable."""
        return NewSession(
            session_id=f"{self.settings.node_name}-{self.ids.token()}",
            principal=exchange.principal,
            transport=transport,
            standalone=self.new_stream(),
            address=exchange.caller.address,
        )

    def turn(self, kind: Kind, exchange: HttpExchange, session_id: str | None) -> AbstractAsyncContextManager[None]:
        """A turn for a POST: see ``Admission.turn``."""
        limits = self.settings
        return self.admission.turn(
            exchange.caller,
            session_id,
            exchange.connection.receive,
            kind=kind,
            most=limits.max_streams,
            patience=limits.hold,
        )

    def opening(self, exchange: HttpExchange) -> AbstractAsyncContextManager[None]:
        """A turn of the caller to open a session; there is a line of them, as of the messages of one session."""
        return self.turn("requests", exchange, None)

    async def large_post(
        self, body: Body, exchange: HttpExchange, session_id: str | None, transport: str = "streamable"
    ) -> Post:
        """Look into a large body; its exchange has its turn. A stranger's is not looked into.

        Raises:
            SessionUnknown: the caller has no such session.
            Refusal: something is wrong with the body.
        """
        if session_id is not None:
            await self.inbox.find(session_id, exchange.principal, transport)
        await json_limits_of(self.settings).check_large(body.text)
        return parse_post(body.text, self.settings.max_batch)

    def small_post(self, body: Body) -> Post:
        """Look into a small body, which costs less than waiting for a turn.

        Raises:
            Refusal: something is wrong with it.
        """
        json_limits_of(self.settings).check(body.text)
        return parse_post(body.text, self.settings.max_batch)

    def leave(self, *, at_once: bool = False) -> None:
        """End every exchange, and refuse what waits for its turn."""
        self.open_streams.leave(at_once=at_once)
        if at_once:
            self.admission.leave()

    def new_stream(self) -> StreamId:
        """An id for a stream; whoever waits for it subscribes before the stream exists."""
        return StreamId(self.ids.uuid())

    async def accept(
        self,
        post: Post,
        exchange: HttpExchange,
        session_id: str,
        stream: StreamId | None,
        transport: str = "streamable",
    ) -> Accepted:
        """Store a POST's messages and wake the owner.

        Args:
            stream: carries the answers, if the POST has requests.
            transport: a session of another one is unknown.

        Raises:
            SessionUnknown: no such session for this caller.
            DuplicateRequest: an unfinished request has the same id, and this is no repeat of its POST.
            DatabaseUnavailable: it could not be committed within the hold.
        """
        arrived = self.lease.database_time(exchange.arrived)
        context = RequestContext(
            self.adapter.describe(exchange.request.scope), can_ask=self.settings.response != "json"
        ).pack()
        principal, messages = exchange.principal, []
        for message in post.messages:
            key = RequestKey(self.ids.uuid())
            messages.append(
                Message(
                    key=key,
                    session_id=session_id,
                    principal=principal,
                    rpc_id=message.rpc_id,
                    method=message.method,
                    name=message.name,
                    body=message.body,
                    context=self.box.seal(context, place_of_context(session_id, key)),
                    stream=stream if message.rpc_id is not None or post.batch else None,  # so that a repeat is known
                    transport=transport,
                    arrived=arrived,
                )
            )
        accepted = await self.inbox.accept(messages)
        if accepted.facts.orphaned:
            self.takeover.touch(accepted.facts.session)
        elif not accepted.joined:
            self.wakeups.inbox(accepted.facts.owner, accepted.facts.session)
        return accepted

    async def end(self, exchange: HttpExchange, session_id: str) -> None:
        """End a session of the caller, and tell every node.

        Raises:
            PgmcpError: as in ``Inbox.end``.
        """
        self.wakeups.ended(await self.inbox.end(session_id, exchange.principal))

    async def attach(
        self, exchange: HttpExchange, session_id: str | None, stream: StreamId | None
    ) -> Attachment | SessionFacts:
        """Become a stream's sink; whoever was it before ends its exchange.

        Args:
            session_id: a session of Streamable HTTP; None: the HTTP+SSE session that the stream belongs to.
            stream: None: the session's standalone stream.

        Raises:
            PgmcpError: as in ``Log.attach``.
        """
        attached = await self.log.attach(session_id, exchange.principal, stream)
        facts = attached.facts if isinstance(attached, Attachment) else attached
        if isinstance(attached, Attachment) and attached.replaced is not None:
            self.wakeups.stream(attached.replaced, attached.stream)
        if facts.orphaned:
            self.takeover.touch(facts.session)
        return attached

    def affinity(self, exchange: HttpExchange, owner: str | None, *, opened: bool = False) -> dict[str, str]:
        """Headers that tell the client, and so the balancer, who owns its session. Advisory: nothing depends on them.

        Args:
            owner: the owner's name; None when it is not known, or has just died.
            opened: whether the session has just been opened.
        """
        if owner is None or not self.settings.affinity_cookie:
            return {}
        return exchange.owner_cookie(owner, opened=opened)

    def stream_response(
        self,
        exchange: HttpExchange,
        open_stream: OpenStream,
        attached: Attachment,
        transport: str = "streamable",
        *,
        after: int = 0,
        floor: int = 0,
        opened: bool = False,
        lost: Callable[[], Awaitable[Sequence[bytes]]] = _nothing,
    ) -> StreamResponse:
        """The response that carries a stream to the caller.

        Args:
            transport: the session's; what a revision brings is of Streamable HTTP only.
            after, floor, lost: as in ``StreamResponse``.
            opened: whether the session has just been opened.
        """
        facts, streamable = attached.facts, transport == "streamable"
        self.open_streams.belongs(open_stream, facts.session)
        resumes = streamable and revision_of(facts.protocol_version).resumes
        resumable = resumes and self.settings.response != "json"
        open_stream.patient = attached.kind is StreamKind.REQUEST and not resumable
        affinity = self.affinity(exchange, facts.living_owner, opened=opened)
        return StreamResponse(
            open_stream,
            attached.sink_epoch,
            after,
            attached.kind,
            floor=floor,
            log=self.log,
            lease=self.lease,
            settings=self.settings,
            clock=self.clock,
            connection=exchange.connection,
            priming=resumes,
            notes_all=streamable,
            expiry=TokenExpiry(self.clock, exchange.expires_at),
            lost=lost,
            headers={SESSION_ID_HEADER: attached.session_id} | affinity,
        )
