"""One live server session: which stream it speaks on, what is stored before what, and how it comes to its end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from pgmcp.clock import Ids
from pgmcp.protocol import REQUEST_CANCELLED
from pgmcp.session.actor import Actor
from pgmcp.session.adapter import Adapter, Conversation, Kind, Outgoing
from pgmcp.session.message_limit import MessageLimit
from pgmcp.session.request_context import RequestContext
from pgmcp.session.running_requests import ActorEnd
from pgmcp.session.state import SessionState
from pgmcp.settings import Settings
from pgmcp.types import Cursor, JournalEntry, NodeId, StreamId
from tests.harness.clock import FakeClock, settle
from tests.harness.memory import MemoryCluster, MemoryStore, memory_store
from tests.harness.stores import Session, opened, request

IDS = Ids()
SAYS = "notifications/message"


class Server:
    """Takes what comes; what it says is up to the test."""

    def __init__(self) -> None:
        self.got: list[str] = []

    async def converse(self, session_id: str, conversation: Conversation) -> None:
        while (incoming := await conversation.receive()) is not None:
            method = json.loads(incoming.body)["method"]
            if method == "notifications/crash":
                raise RuntimeError
            self.got.append(method)


async def keep(entry: JournalEntry) -> None:
    raise AssertionError(entry)


class Scene:
    """An actor of a session, and the tables."""

    def __init__(self, cluster: MemoryCluster, store: MemoryStore, session: Session, clock: FakeClock) -> None:
        self.cluster, self.store, self.session = cluster, store, session
        self.server, self.stored, self.over = Server(), list[str](), list[ActorEnd]()
        cluster.stored = lambda node, statement, ownership: self.stored.append(statement)
        self.actor = Actor(
            session.ownership,
            SessionState(session.session_id, keep, restored=False),
            (session.standalone, 1),
            adapter=cast("Adapter", self.server),
            inbox=store.inbox,
            log=store.log,
            clock=clock,
            ids=IDS,
            message_limit=MessageLimit(10_000),
            wake_sink=lambda sink, stream: None,
            version=None,
            on_over=lambda actor, how: self.over.append(how),
        )
        self.actor.start()

    async def asks(self, rpc_id: int, method: str = "tools/call", **params: object) -> StreamId:
        """The client's request reaches the actor; its stream."""
        body = json.dumps({"jsonrpc": "2.0", "id": rpc_id, "method": method, "params": params}).encode()
        message = request(self.session, str(rpc_id), body, method=method)
        await self.store.inbox.accept([message])
        await self._deliver()
        assert message.stream is not None
        return message.stream

    async def notifies(self, method: str, **params: object) -> None:
        """The client's notification reaches the actor."""
        body = json.dumps({"jsonrpc": "2.0", "method": method, "params": params}).encode()
        await self.store.inbox.accept([request(self.session, None, body, method=method)])
        await self._deliver()

    async def _deliver(self) -> None:
        claimed = await self.store.inbox.claim(self.session.ownership)
        self.actor.expect(claimed)
        for message in claimed:
            await self.actor.deliver(message, RequestContext({}))
        await settle()

    async def says(self, related: int | None = None) -> None:
        """The server's notification, of a request or of the session."""
        message = json.dumps({"jsonrpc": "2.0", "method": SAYS, "params": {}}).encode()
        rpc_id = None if related is None else str(related)
        await self.actor.emit(Outgoing(Kind.NOTIFICATION, message, method=SAYS, related=rpc_id))

    async def answers(self, rpc_id: int, **result: object) -> None:
        """The server's answer."""
        message = json.dumps({"jsonrpc": "2.0", "id": rpc_id, "result": result}).encode()
        await self.actor.emit(Outgoing(Kind.RESULT, message, str(rpc_id)))

    def said(self, stream: StreamId) -> list[dict[str, Any]]:
        """What the log has of a stream."""
        events = self.cluster.streams[stream].events
        return [json.loads(events[seq][0]) for seq in sorted(events)]

    def take_away(self) -> None:
        """Another node becomes the session's owner."""
        self.cluster.change_owner(self.cluster.sessions[self.session.key], NodeId(IDS.uuid()), "test")


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    clock = FakeClock()
    cluster = MemoryCluster(clock, Settings())
    store = memory_store(cluster, clock, IDS)
    made = Scene(cluster, store, await opened(store), clock)
    yield made
    await made.actor.stop()


async def test_what_belongs_to_a_request_is_said_on_its_stream_until_its_answer(scene: Scene) -> None:
    stream = await scene.asks(1)
    await scene.says(related=1)
    await scene.says()
    await scene.answers(1)
    await scene.says(related=1)  # too late: there is nowhere to say it
    assert [message.get("method") for message in scene.said(stream)] == [SAYS, None]
    assert [message.get("method") for message in scene.said(scene.session.standalone)] == [SAYS]
    assert scene.cluster.streams[stream].closed


async def test_a_request_is_answered_once(scene: Scene) -> None:
    stream = await scene.asks(1)
    for number in range(2):
        await scene.answers(1, number=number)
    assert [message["result"] for message in scene.said(stream)] == [{"number": 0}]
    assert not scene.actor.working


async def test_a_muted_actor_says_nothing(scene: Scene) -> None:
    stream = await scene.asks(1)
    scene.actor.mute()
    await scene.says()
    await scene.answers(1)
    assert scene.said(stream) == scene.said(scene.session.standalone) == []
    assert scene.over == [], "it was muted by its node, which knows"


async def test_a_refused_write_ends_it_and_is_reported_once(scene: Scene) -> None:
    await scene.asks(1)
    scene.take_away()
    await scene.says()
    await scene.answers(1)
    assert (scene.over, scene.actor.muted) == ([ActorEnd.FENCED], True)
    assert "append" not in scene.stored


async def test_what_a_handshake_settles_is_stored_before_its_answer(scene: Scene) -> None:
    await scene.asks(0, "initialize", capabilities={}, clientInfo={"name": "c", "version": "1"})
    scene.stored.clear()
    await scene.answers(0, protocolVersion="2025-11-25")
    assert scene.stored == ["establish", "write_journal", "write_journal", "append"]


async def test_what_cannot_be_established_is_not_answered(scene: Scene) -> None:
    stream = await scene.asks(0, "initialize", capabilities={})
    scene.take_away()
    await scene.answers(0, protocolVersion="2025-11-25")
    assert (scene.said(stream), scene.over) == ([], [ActorEnd.FENCED])


async def test_a_cancel_that_overtook_its_request_ends_it_unseen(scene: Scene) -> None:
    await scene.notifies("notifications/cancelled", requestId=1)
    stream = await scene.asks(1)
    assert [message["error"]["code"] for message in scene.said(stream)] == [REQUEST_CANCELLED]
    assert scene.server.got == []


async def test_a_late_cancel_does_not_hit_the_next_request_that_has_the_id(scene: Scene) -> None:
    first = await scene.asks(1)
    await scene.answers(1)
    await scene.store.log.release(Cursor(first, 1, 1))  # its client has the answer
    await scene.notifies("notifications/cancelled", requestId=1)
    second = await scene.asks(1)
    assert scene.server.got == ["tools/call", "tools/call"]
    assert scene.said(second) == []


async def test_a_server_that_crashes_ends_its_session(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    await scene.notifies("notifications/crash")
    assert scene.over == [ActorEnd.ENDED]
    assert "crashed" in caplog.text
