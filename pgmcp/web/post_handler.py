"""One POST on its way through the Streamable HTTP endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pgmcp.errors import PgmcpError, SessionBusy
from pgmcp.protocol import BATCHING, INTERNAL_ERROR, SESSION_ID_HEADER, error_of, revision_of
from pgmcp.types import Accepted, Attachment, SessionFacts, StreamId
from pgmcp.web.admission import Kind
from pgmcp.web.bodies import Body
from pgmcp.web.edge import Edge
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_rpc import Parsed, Post, Refusal, accepts
from pgmcp.web.stream_response import StreamResponse

LOST = (
    "The database lost this request when its primary changed, and nobody knows whether it took effect. "
    "Find out, then send the request again under a new id."
)


def _error(rpc_id: str | None) -> bytes:
    data = {"reason": "commits_lost", "outcome": "unknown"}
    return json.dumps(error_of(rpc_id, INTERNAL_ERROR, LOST, data)).encode()


class PostHandler:
    """Takes the messages of one POST and carries their answers.

    A small body is looked into before its turn, so that cancels and answers stand in a line of their own; a large one
    only in its turn, and when its session was found. What was stored is not held in memory while it is answered.
    """

    def __init__(self, edge: Edge, exchange: HttpExchange, body: Body) -> None:
        self._edge, self._exchange, self._body = edge, exchange, body
        self._response = edge.settings.response
        self._post = Post((), batch=False)

    async def answer(self) -> None:
        """Answer the POST.

        Raises:
            Refusal: something is wrong with it; nothing was stored.
            PgmcpError: as in ``Edge.accept``.
        """
        json_ok, sse_ok = accepts(self._exchange.request)
        if not json_ok or not (sse_ok or self._response == "json"):
            wanted = "application/json" + ("" if self._response == "json" else " and text/event-stream")
            raise Refusal(406, f"Not Acceptable: Client must accept {wanted}")
        await (self._small() if self._body.small else self._large())

    async def _small(self) -> None:
        self._post = self._edge.small_post(self._body)
        if self._post.initialize is not None:
            async with self._edge.opening(self._exchange):
                await self._initialize(self._post.initialize)
            return
        session_id = self._exchange.session_id
        kind: Kind = "requests" if self._post.requests else "messages"
        with self._room(session_id):
            async with self._edge.turn(kind, self._exchange, session_id):
                await self._take(session_id)

    async def _large(self) -> None:
        session_id = self._exchange.session_id if self._exchange.header(SESSION_ID_HEADER) else None
        async with self._edge.turn("large", self._exchange, session_id):
            self._post = await self._edge.large_post(self._body, self._exchange, session_id)
            if self._post.initialize is not None:
                await self._initialize(self._post.initialize)
                return
            session_id = self._exchange.session_id
            with self._room(session_id):
                await self._take(session_id)

    @contextmanager
    def _room(self, session_id: str) -> Iterator[None]:
        """Count what waits for answers: those that nobody reads hold their streams, with nothing in flight any more."""
        if not self._post.requests:
            yield
            return
        most = self._edge.settings.max_streams
        with self._edge.open_streams.post(self._exchange.caller, session_id, most) as room:
            if not room:
                message = f"This session has {most} streams open; close one before you open another."
                raise SessionBusy(message)
            yield

    async def _take(self, session_id: str) -> None:
        if self._post.batch:
            await self._check_batch(session_id)
        if self._post.requests:
            await self._requests(session_id)
        else:
            facts = (await self._accept(session_id, None)).facts
            await self._exchange.respond(202, self._edge.affinity(self._exchange, facts.living_owner))

    async def _accept(self, session_id: str, stream: StreamId | None) -> Accepted:
        accepted = await self._edge.accept(self._post, self._exchange, session_id, stream)
        self._post = self._post.stored
        self._body.drop()
        return accepted

    async def _check_batch(self, session_id: str) -> None:
        facts = await self._edge.inbox.find(session_id, self._exchange.principal)
        if not revision_of(facts.protocol_version).batches:
            raise Refusal(400, f"Batches belong to {BATCHING}, this session speaks {facts.protocol_version}")

    async def _requests(self, session_id: str) -> None:
        stream, term, batch = self._edge.new_stream(), self._edge.term(), self._post.batch
        with self._edge.open_streams.subscribe(stream) as open_stream:
            accepted = await self._accept(session_id, stream)
            if not accepted.joined:
                attached = Attachment.to_new(accepted.facts, session_id, stream)
                response = self._edge.stream_response(
                    self._exchange, open_stream, attached, lost=lambda: self._lost(stream, term)
                )
                await self._carry(response, batch=batch)
                return
        await self._join(accepted, session_id, batch=batch)

    async def _join(self, accepted: Accepted, session_id: str, *, batch: bool) -> None:
        """The same POST is there already: carry its stream from the start, instead of whoever carried it."""
        attached = await self._edge.attach(self._exchange, session_id, accepted.stream)
        if not isinstance(attached, Attachment):
            raise Refusal(409, "The request that has this id was just answered elsewhere; use another id")
        with self._edge.open_streams.subscribe(attached.stream) as open_stream:
            response = self._edge.stream_response(self._exchange, open_stream, attached)
            open_stream.moved.set()  # what the stream holds already, nobody announces again
            await self._carry(response, batch=batch)

    async def _lost(self, stream: StreamId, term: int) -> list[bytes]:
        """Errors for requests that were accepted in a timeline that is over, and are not in this one."""
        if self._edge.term() == term:
            return []
        with suppress(PgmcpError):
            if not await self._edge.log.knows(stream):
                return [_error(request.rpc_id) for request in self._post.requests]
        return []

    async def _carry(self, response: StreamResponse, *, batch: bool) -> None:
        try:
            match self._response:
                case "json":
                    await response.answer_json(batch=batch)
                case "auto":
                    await response.answer_auto(batch=batch)
                case _:
                    await response.stream()
        finally:
            await response.release()

    async def _initialize(self, message: Parsed) -> None:
        """Open a session here; its client hears of it when the handshake has succeeded and is stored."""
        edge, exchange = self._edge, self._exchange
        if exchange.header(SESSION_ID_HEADER):
            await edge.inbox.find(exchange.session_id, exchange.principal)
            raise Refusal(400, "This session is initialized already; send initialize without a session id for another")
        asked = (message.params or {}).get("protocolVersion")
        new, stream = edge.new_session(exchange, "streamable"), edge.new_stream()
        owned = await edge.host.open(new)
        established = False
        try:
            with edge.open_streams.subscribe(stream) as open_stream:
                version, name = asked if isinstance(asked, str) else None, edge.settings.node_name
                facts = SessionFacts(owned.session, edge.node, owned.epoch, version, owner_name=name)
                attached = Attachment.to_new(facts, new.session_id, stream)
                response = edge.stream_response(exchange, open_stream, attached, opened=True)
                open_stream.patient = True  # its client knows no session yet
                await self._accept(new.session_id, stream)
                try:
                    page = await response.handshake()
                    established = True
                    if self._response == "sse":
                        await response.stream(first=page)
                    else:
                        await response.send_json(page.events, batch=False)
                finally:
                    await response.release()
        finally:
            if not established:
                with suppress(PgmcpError):
                    await edge.end(exchange, new.session_id)
