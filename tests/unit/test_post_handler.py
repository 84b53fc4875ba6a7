"""One POST: what is refused stores nothing, what is said was stored, and what was stored is let go of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, cast

import pytest
from starlette.requests import Request
from starlette.types import Message

from pgmcp.clock import Ids
from pgmcp.errors import SessionBusy
from pgmcp.settings import Settings
from pgmcp.types import Accepted, NodeId, Principal, SessionFacts, SessionKey, StreamId
from pgmcp.web.bodies import Bodies
from pgmcp.web.connection import Connection
from pgmcp.web.edge import Edge
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_rpc import Post, Refusal, parse_post
from pgmcp.web.open_streams import OpenStreams
from pgmcp.web.post_handler import PostHandler
from tests.harness.clock import FakeClock

IDS = Ids()
OWNER = NodeId(IDS.uuid())
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
NOTE = {"jsonrpc": "2.0", "method": "notifications/x"}
BOTH = {"accept": "application/json, text/event-stream"}


class FakeEdge:
    """Accepts everything; ``steps`` has what happens, in order. It is its own inbox, and carries streams itself."""

    def __init__(self, version: str = "2025-11-25", **settings: Any) -> None:
        self.settings, self.open_streams = Settings(**settings), OpenStreams()
        self.bodies = Bodies(100_000, FakeClock())
        self.facts = SessionFacts(SessionKey(1), OWNER, 1, version)
        self.steps: list[str] = []
        self.breaks = False
        self.held = -1
        """Bytes of bodies in memory while the answer was carried."""

    @property
    def inbox(self) -> FakeEdge:
        return self

    async def find(self, session_id: str, principal: Principal) -> SessionFacts:
        return self.facts

    def small_post(self, body: Any) -> Post:
        return parse_post(body.text, self.settings.max_batch)

    def turn(self, kind: str, exchange: HttpExchange, session_id: str | None) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    def new_stream(self) -> StreamId:
        return StreamId(IDS.uuid())

    def term(self) -> int:
        return 0

    def affinity(self, exchange: HttpExchange, owner: str | None) -> dict[str, str]:
        return {}

    async def accept(self, post: Post, exchange: HttpExchange, session_id: str, stream: StreamId | None) -> Accepted:
        await asyncio.sleep(0)
        self.steps.append("accepted")
        assert stream is None or self.open_streams.hears(stream), "who waits for a stream subscribes before it exists"
        return Accepted(self.facts, stream, joined=False)

    def stream_response(self, *_: object, **__: object) -> FakeEdge:
        return self

    async def stream(self) -> None:
        self.steps.append("carried")
        self.held = self.bodies.total
        if self.breaks:
            raise ConnectionError

    async def release(self) -> None:
        self.steps.append("released")

    async def post(self, message: object, headers: Mapping[str, str] = BOTH) -> None:
        """POST a message of session ``s``."""
        pairs = [(name.encode(), value.encode()) for name, value in {"mcp-session-id": "s", **headers}.items()]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/mcp", "headers": pairs}

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(sent: Message) -> None:
            if sent["type"] == "http.response.start":
                self.steps.append(str(sent["status"]))

        exchange = HttpExchange(Request(scope), Connection(receive, send, 5.0))
        with self.bodies.body(exchange.caller) as body:
            body.text = json.dumps(message).encode()
            body.grow(len(body.text))
            await PostHandler(cast("Edge", self), exchange, body).answer()


@pytest.mark.parametrize("accept", [{}, {"accept": "text/html"}, {"accept": "application/json"}], ids=len)
async def test_a_client_that_does_not_take_both_kinds_of_answers_is_refused(accept: dict[str, str]) -> None:
    edge = FakeEdge()
    with pytest.raises(Refusal) as refused:
        await edge.post(PING, accept)
    assert (refused.value.status, edge.steps) == (406, [])


async def test_json_is_enough_where_nothing_else_is_answered() -> None:
    edge = FakeEdge(response="json")
    await edge.post(NOTE, {"accept": "application/json"})
    assert edge.steps == ["accepted", "202"]


async def test_a_notification_is_stored_before_that_is_said() -> None:
    edge = FakeEdge()
    await edge.post(NOTE)
    assert edge.steps == ["accepted", "202"]


async def test_a_body_is_let_go_of_when_it_is_stored() -> None:
    edge = FakeEdge()
    await edge.post(PING)
    assert (edge.steps, edge.held) == (["accepted", "carried", "released"], 0)


async def test_a_stream_is_let_go_of_also_when_it_breaks() -> None:
    edge = FakeEdge()
    edge.breaks = True
    with pytest.raises(ConnectionError):
        await edge.post(PING)
    assert edge.steps == ["accepted", "carried", "released"]
    assert (len(edge.open_streams), edge.bodies.total) == (0, 0)


async def test_batches_are_for_the_revision_that_has_them() -> None:
    batch = [PING, NOTE]
    newer, older = FakeEdge(), FakeEdge("2025-03-26")
    with pytest.raises(Refusal) as refused:
        await newer.post(batch)
    assert (refused.value.status, newer.steps) == (400, [])
    await older.post(batch)
    assert older.steps == ["accepted", "carried", "released"]


async def test_posts_that_wait_for_answers_are_bounded() -> None:
    edge, inside, go_on = FakeEdge(max_streams=1), asyncio.Event(), asyncio.Event()
    carry = edge.stream

    async def held() -> None:
        inside.set()
        await go_on.wait()
        await carry()

    edge.stream = held  # type: ignore[method-assign]  # it lasts
    first = asyncio.create_task(edge.post(PING))
    await inside.wait()
    with pytest.raises(SessionBusy, match="1 streams"):
        await edge.post(PING)
    await edge.post(NOTE)  # waits for no answer
    assert edge.steps == ["accepted", "accepted", "202"]
    go_on.set()
    await first
