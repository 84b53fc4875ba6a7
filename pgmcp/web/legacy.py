"""HTTP+SSE (2024-11-05) across nodes.

``GET /sse`` carries the session's one stream, ``POST /messages/`` takes its messages.

The same inbox and the same log as for Streamable HTTP; every answer goes on the standalone stream, since there is no
other.

Failure handling: a broken connection does not end the session at once. A client that comes back with the
``Last-Event-ID`` of a live session (a browser's EventSource does) goes on with it, on any node; others get a new
session, and the old one expires. So does one whose next events were pruned: never a silent gap (G3).
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from starlette.responses import PlainTextResponse

from pgmcp.errors import SessionUnknown, StreamTaken
from pgmcp.protocol import LAST_EVENT_ID_HEADER
from pgmcp.types import Attachment, Cursor
from pgmcp.web.bodies import Body
from pgmcp.web.edge import Edge
from pgmcp.web.endpoint import Endpoint, Rules, cursor
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_rpc import Post, Refusal


class SseStream(Endpoint):
    """``GET /sse``: opens a session, or goes on with one.

    Args:
        messages: the path of the other endpoint.
    """

    methods = ("GET",)

    def __init__(self, edge: Callable[[], Edge], rules: Rules, *, messages: str) -> None:
        super().__init__(edge, rules)
        self._messages = messages

    def opens(self, exchange: HttpExchange) -> bool:
        """See ``Front.opens``; what cannot be resumed is counted when that is known."""
        return exchange.request.method == "GET" and not exchange.header(LAST_EVENT_ID_HEADER)

    async def answer(self, edge: Edge, exchange: HttpExchange, body: Body) -> None:
        """See ``Endpoint.answer``."""
        last = exchange.header(LAST_EVENT_ID_HEADER)
        attached, after = await self._resumed(edge, exchange, last) if last else (None, 0)
        if attached is None:
            if last:
                self._rates.opening(exchange)
            await edge.lease.acting()
            new = edge.new_session(exchange, "sse")
            async with edge.opening(exchange):
                await edge.host.open(new)
            carried = await edge.attach(exchange, None, new.standalone)
            if not isinstance(carried, Attachment):
                raise SessionUnknown("Session not found")
            await self._carry(edge, exchange, carried, 0, opened=True)
        else:
            await self._carry(edge, exchange, attached, after, opened=False)

    async def _resumed(self, edge: Edge, exchange: HttpExchange, last: str) -> tuple[Attachment | None, int]:
        try:
            stream, after = cursor(last)
            attached = await edge.attach(exchange, None, stream)
        except (Refusal, SessionUnknown, StreamTaken):
            return None, 0  # an EventSource that is refused never comes back
        if not isinstance(attached, Attachment):
            return None, 0
        if after < attached.floor_seq:
            await edge.log.release(Cursor(attached.stream, attached.sink_epoch, after))
            return None, 0  # what it has not seen is not there any more
        return attached, after

    async def _carry(
        self, edge: Edge, exchange: HttpExchange, attached: Attachment, after: int, *, opened: bool
    ) -> None:
        root = exchange.request.scope.get("root_path", "").rstrip("/")
        retry = f"retry: {edge.settings.retry_ms}\r\n"
        where = f"{quote(root + self._messages)}?session_id={attached.session_id}"
        with edge.open_streams.subscribe(attached.stream) as open_stream:
            response = edge.stream_response(exchange, open_stream, attached, "sse", after=after, opened=opened)
            try:
                await response.stream(look=True, preface=f"{retry}event: endpoint\r\ndata: {where}\r\n\r\n".encode())
            finally:
                await response.release()


class SseMessages(Endpoint):
    """``POST /messages/?session_id=...``: takes one message; its answer comes on the stream."""

    methods = ("POST",)

    async def answer(self, edge: Edge, exchange: HttpExchange, body: Body) -> None:
        """See ``Endpoint.answer``."""
        session_id = exchange.request.query_params.get("session_id", "")
        if not session_id:
            raise Refusal(400, "Bad Request: session_id is missing; POST to the URI of the endpoint event")
        if not all("!" <= char <= "~" for char in session_id):
            raise Refusal(404, "Session not found")
        if body.small:
            post = edge.small_post(body)
            async with edge.turn("requests" if post.requests else "messages", exchange, session_id):
                await _accept(edge, exchange, post, session_id)
        else:
            async with edge.turn("large", exchange, session_id):
                await _accept(edge, exchange, await edge.large_post(body, exchange, session_id, "sse"), session_id)


async def _accept(edge: Edge, exchange: HttpExchange, post: Post, session_id: str) -> None:
    if post.batch:
        raise Refusal(400, "HTTP+SSE has no batches; POST one message")
    facts = (await edge.accept(post, exchange, session_id, None, "sse")).facts
    headers = edge.affinity(exchange, facts.living_owner)
    await exchange.send_response(PlainTextResponse("Accepted", 202, headers))
