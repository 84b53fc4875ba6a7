"""The Streamable HTTP endpoint for the handshake revisions (2025-03-26, 2025-06-18, 2025-11-25).

Any node answers any exchange: it authenticates and checks where the exchange arrives, stores what the client said,
wakes the owner, and carries the streams from the log.

Invariants:
- 202, a session id, a priming event and an event are sent after what they promise is committed (G2).
- 404 means: this session is over, was never there, or is somebody else's - and nothing else (G6, G7).
- Whatever is wrong with a message is said before anything is stored.
"""

from __future__ import annotations

from pgmcp.protocol import LAST_EVENT_ID_HEADER, SESSION_ID_HEADER
from pgmcp.types import Attachment
from pgmcp.web.bodies import Body
from pgmcp.web.edge import Edge
from pgmcp.web.endpoint import Endpoint, cursor
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_rpc import Refusal, accepts
from pgmcp.web.post_handler import PostHandler


class Streamable(Endpoint):
    """The endpoint as an ASGI application."""

    methods = ("GET", "POST", "DELETE")

    def opens(self, exchange: HttpExchange) -> bool:
        """See ``Front.opens``; without a session id everything else is refused."""
        return exchange.request.method == "POST" and not exchange.header(SESSION_ID_HEADER)

    async def answer(self, edge: Edge, exchange: HttpExchange, body: Body) -> None:
        """See ``Endpoint.answer``."""
        match exchange.request.method:
            case "POST":
                await PostHandler(edge, exchange, body).answer()
            case "GET":
                await _get(edge, exchange)
            case _:
                await edge.end(exchange, exchange.session_id)
                await exchange.respond(200)


async def _get(edge: Edge, exchange: HttpExchange) -> None:
    """Carry the standalone stream, or resume any stream after ``Last-Event-ID``."""
    if not accepts(exchange.request)[1]:
        raise Refusal(406, "Not Acceptable: Client must accept text/event-stream")
    session_id, last = exchange.session_id, exchange.header(LAST_EVENT_ID_HEADER)
    stream, after = cursor(last) if last else (None, None)
    attached = await edge.attach(exchange, session_id, stream)
    if not isinstance(attached, Attachment):
        await exchange.respond(204)
        return
    floor = 0
    if after is None:  # it wants what waits, and what had to give way does not
        after, floor = attached.delivered_seq, attached.floor_seq
    with edge.open_streams.subscribe(attached.stream) as open_stream:
        response = edge.stream_response(exchange, open_stream, attached, after=after, floor=floor)
        try:
            if max(after, floor) < attached.floor_seq or (attached.closed and after >= attached.next_seq - 1):
                await exchange.respond(
                    204
                )  # not whole, or finished and delivered: an empty 200 would make clients loop
            else:
                await response.stream(look=True)
        finally:
            await response.release()
