"""One exchange that carries one stream: in order, nothing twice, nothing without trust, and how it ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from starlette.types import Message

from pgmcp.clock import Ids
from pgmcp.cluster.lease import Lease
from pgmcp.settings import Settings
from pgmcp.types import ANONYMOUS, Claimed, StreamId, StreamKind
from pgmcp.web.connection import Connection
from pgmcp.web.json_rpc import Refusal
from pgmcp.web.open_streams import OpenStream, OpenStreams
from pgmcp.web.sse_response import event_id
from pgmcp.web.stream_response import StreamResponse
from pgmcp.web.token_expiry import TokenExpiry
from tests.harness.clients import SseEvent, SseParser
from tests.harness.clock import FakeClock, settle
from tests.harness.memory import MemoryCluster, memory_store
from tests.harness.stores import Session, answer, opened, request

IDS = Ids()
NOTE = b'{"jsonrpc":"2.0","method":"notifications/message"}'
ANSWER = b'{"jsonrpc":"2.0","id":1,"result":{}}'


class Trust:
    """A lease that the test suspends."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock, self._back = clock, asyncio.Event()
        self.trusted, self.suspended_for = True, 0.0

    async def acting(self) -> None:
        assert self.trusted

    async def trusted_within(self, seconds: float) -> bool:
        await self._clock.wait(self._back, seconds)
        return self.trusted

    def suspend(self) -> None:
        self.trusted = False

    def come_back(self) -> None:
        self.trusted = True
        self._back.set()


async def nothing_lost() -> Sequence[bytes]:
    return ()


class Scene:
    """A request that its owner works on, and the exchange that waits for its answer."""

    def __init__(
        self, clock: FakeClock, open_stream: OpenStream, session: Session, claimed: Claimed, cluster: MemoryCluster
    ) -> None:
        self.clock, self.open_stream = clock, open_stream
        self.session, self.claimed, self.cluster = session, claimed, cluster
        self.trust, self.gone = Trust(clock), asyncio.Event()
        self.sent: list[Message] = []
        self.settings = cluster.settings

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def stream(self) -> StreamId:
        return self.open_stream.stream

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def whole(self) -> bool:
        """Whether the response has its end."""
        return bool(self.sent) and not self.sent[-1].get("more_body", False)

    def events(self) -> list[SseEvent]:
        return SseParser().feed(self.body)


@pytest.fixture
async def made() -> AsyncIterator[tuple[Scene, StreamResponse, Any]]:
    clock = FakeClock()
    cluster = MemoryCluster(clock, Settings())
    store = memory_store(cluster, clock, IDS)
    session = await opened(store)
    message = request(session)
    await store.inbox.accept([message])
    [claimed] = await store.inbox.claim(session.ownership)
    assert message.stream is not None
    with OpenStreams().subscribe(message.stream) as open_stream:
        scene = Scene(clock, open_stream, session, claimed, cluster)
        response = StreamResponse(
            open_stream,
            1,
            0,
            StreamKind.REQUEST,
            floor=0,
            log=store.log,
            lease=cast("Lease", scene.trust),
            settings=scene.settings,
            clock=clock,
            connection=Connection(scene.receive, scene.send, 5.0),
            priming=True,
            notes_all=True,
            expiry=TokenExpiry(clock, math.inf),
            lost=nothing_lost,
            headers={},
        )
        yield scene, response, store


async def speaks(scene: Scene, store: Any, seq: int, message: bytes = NOTE) -> None:
    """The owner stores an event and wakes the exchange."""
    entry = answer(scene.claimed, seq, message)
    await store.log.append(entry if message == ANSWER else replace(entry, finishes=None, outcome=None))
    scene.open_stream.moved.set()


async def test_events_are_written_once_in_order_to_the_end(made: tuple[Scene, StreamResponse, Any]) -> None:
    scene, response, store = made
    carried = asyncio.create_task(response.stream())
    for seq, message in enumerate([NOTE, NOTE, ANSWER], 1):
        await speaks(scene, store, seq, message)
        await settle()
        scene.open_stream.moved.set()  # woken once more for nothing
        await settle()
    await carried
    priming, *events = scene.events()
    assert priming.is_priming
    assert [event.id for event in events] == [event_id(scene.stream, seq) for seq in (1, 2, 3)]
    assert [event.data for event in events] == [NOTE.decode(), NOTE.decode(), ANSWER.decode()]
    assert scene.whole


async def test_without_trust_a_client_gets_comments_only(made: tuple[Scene, StreamResponse, Any]) -> None:
    scene, response, store = made
    carried = asyncio.create_task(response.stream())
    await settle()
    scene.trust.suspend()
    await speaks(scene, store, 1, ANSWER)
    before = len(scene.sent)
    for _ in range(3):
        await scene.clock.advance(scene.settings.keepalive + 1)
    assert {message["body"] for message in scene.sent[before:]} - {b""} == {b": \r\n\r\n"}
    scene.trust.come_back()
    await settle()
    await carried
    assert [event.data for event in scene.events() if event.data] == [ANSWER.decode()]


async def test_a_client_that_goes_ends_its_exchange_and_nothing_else(made: tuple[Scene, StreamResponse, Any]) -> None:
    scene, response, store = made
    carried = asyncio.create_task(response.stream())
    await settle()
    scene.gone.set()
    await settle()
    await carried
    await response.release()
    assert not scene.whole, "nothing more is said to whom is gone"
    stream, asked = scene.cluster.streams[scene.stream], scene.cluster.requests[scene.claimed.key]
    assert (stream.sink, stream.closed, asked.finished) == (None, False, False)
    await speaks(scene, store, 1, ANSWER)
    assert scene.cluster.requests[scene.claimed.key].finished


async def test_plain_json_is_the_answer_alone(made: tuple[Scene, StreamResponse, Any]) -> None:
    scene, response, store = made
    answered = asyncio.create_task(response.answer_json(batch=False))
    await speaks(scene, store, 1)
    await settle()
    assert scene.sent == []
    await speaks(scene, store, 2, ANSWER)
    await settle()
    await answered
    assert scene.body == ANSWER
    assert (b"content-length", str(len(ANSWER)).encode()) in scene.sent[0]["headers"]
    assert scene.whole


@pytest.mark.parametrize("form", ["json", "sse"])
async def test_a_newer_sink_ends_an_exchange(made: tuple[Scene, StreamResponse, Any], form: str) -> None:
    scene, response, store = made
    carrying = response.answer_json(batch=False) if form == "json" else response.stream()
    carried = asyncio.create_task(carrying)
    await settle()
    await store.log.attach(scene.session.session_id, ANONYMOUS, scene.stream)
    await speaks(scene, store, 1, ANSWER)
    await settle()
    if form == "json":
        with pytest.raises(Refusal) as refused:
            await carried
        assert (refused.value.status, scene.sent) == (409, [])
    else:
        await carried
        assert (ANSWER not in scene.body, scene.whole) == (True, True)
