"""Wake-ups: ids only, one NOTIFY in flight, and nothing dirty is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgmcp.clock import Ids
from pgmcp.cluster import wakeups as module
from pgmcp.cluster.wakeups import EVERYTHING, MAX_DIRTY, PAYLOAD_BYTES, Wakeups, parse
from pgmcp.errors import DatabaseUnavailable
from pgmcp.types import NodeId, SessionKey, StreamId, Wake, alias_of, node_id
from tests.harness.clock import FakeClock, settle

IDS = Ids()
ME, OTHER, THIRD = (NodeId(IDS.uuid()) for _ in range(3))


class Notes:
    """A notifier that the test can hold and break."""

    def __init__(self) -> None:
        self.sent: list[list[tuple[NodeId | None, str]]] = []
        self.running = 0
        self.away = False
        self.free = asyncio.Event()
        self.free.set()

    async def notify(self, payloads: Sequence[tuple[NodeId | None, str]]) -> None:
        assert self.running == 0, "two NOTIFYs of a node are in flight"
        self.running += 1
        try:
            await self.free.wait()
            if self.away:
                message = "away"
                raise DatabaseUnavailable(message)
            self.sent.append(list(payloads))
        finally:
            self.running -= 1


class Scene:
    def __init__(self) -> None:
        self.notes, self.clock, self.heard = Notes(), FakeClock(), list[Wake]()
        self.wakeups = Wakeups(ME, self.notes, self.clock, self.heard.append)
        self.running: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Stop as an incarnation does."""
        if self.running is not None:
            self.running.cancel()
            await asyncio.wait({self.running})
        await self.wakeups.stop()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    made.running = asyncio.create_task(made.wakeups.run())
    yield made
    await made.stop()


async def test_what_is_for_this_node_stays_in_the_process(scene: Scene) -> None:
    stream = StreamId(IDS.uuid())
    scene.wakeups.inbox(ME, SessionKey(1))
    scene.wakeups.stream(ME, stream)
    await settle()
    assert scene.heard == [Wake(inboxes=frozenset({SessionKey(1)})), Wake(streams=frozenset({alias_of(stream)}))]
    assert scene.notes.sent == []


async def test_streams_go_by_their_aliases_and_to_older_builds_by_their_ids(scene: Scene) -> None:
    stream, newer = StreamId(IDS.uuid()), node_id(IDS.uuid())
    scene.wakeups.stream(newer, stream)
    scene.wakeups.stream(OTHER, stream)
    await settle()
    said = dict(each for sent in scene.notes.sent for each in sent)
    assert said == {newer: f"t{alias_of(stream)}", OTHER: f"s{stream.hex}"}
    assert stream.hex not in said[newer]
    assert [parse(payload).streams for payload in said.values()] == [frozenset({alias_of(stream)})] * 2


async def test_an_end_goes_to_everybody(scene: Scene) -> None:
    scene.wakeups.ended(SessionKey(7))
    await settle()
    assert scene.heard == [Wake(ended=frozenset({SessionKey(7)}))]
    assert scene.notes.sent == [[(None, "e7")]]


async def test_publications_are_told_to_everybody(scene: Scene) -> None:
    scene.wakeups.published()
    scene.wakeups.published()
    await settle()
    assert scene.heard == [Wake(published=True)] * 2
    assert scene.notes.sent == [[(None, "p")]]
    assert parse("i1,p") == Wake(inboxes=frozenset({SessionKey(1)}), published=True)


async def test_the_first_goes_at_once_and_the_rest_together(scene: Scene) -> None:
    scene.notes.free.clear()
    scene.wakeups.inbox(OTHER, SessionKey(1))
    await settle()
    for key in (2, 3, 2, 1):
        scene.wakeups.inbox(OTHER, SessionKey(key))
    scene.wakeups.inbox(THIRD, SessionKey(4))
    scene.notes.free.set()
    await settle()
    assert scene.notes.sent == [[(OTHER, "i1")], [(OTHER, "i2,i3,i1"), (THIRD, "i4")]]


async def test_what_is_dirty_stays_dirty_until_it_went_out(scene: Scene) -> None:
    scene.notes.away = True
    scene.wakeups.inbox(OTHER, SessionKey(1))
    await scene.clock.advance(10)
    scene.wakeups.inbox(OTHER, SessionKey(2))
    scene.wakeups.inbox(THIRD, SessionKey(3))
    await scene.clock.advance(10)
    assert scene.notes.sent == []
    scene.notes.away = False
    await scene.clock.advance(module.RETRY_SECONDS)
    (sent,) = scene.notes.sent
    assert {node: set(payload.split(",")) for node, payload in sent} == {OTHER: {"i1", "i2"}, THIRD: {"i3"}}


async def test_too_much_for_one_payload_becomes_everything(scene: Scene) -> None:
    scene.notes.free.clear()
    scene.wakeups.inbox(OTHER, SessionKey(0))
    await settle()
    for _ in range(PAYLOAD_BYTES // 34 + 1):
        scene.wakeups.stream(OTHER, StreamId(IDS.uuid()))
    scene.wakeups.inbox(THIRD, SessionKey(1))
    scene.notes.free.set()
    await settle()
    assert scene.notes.sent[1] == [(OTHER, EVERYTHING), (THIRD, "i1")]


async def test_an_outage_keeps_a_bounded_number_of_ids(scene: Scene) -> None:
    scene.notes.away = True
    for key in range(MAX_DIRTY + 100):
        scene.wakeups.inbox(OTHER, SessionKey(key))
    await settle()
    assert scene.wakeups.waiting <= MAX_DIRTY
    scene.notes.away = False
    await scene.clock.advance(1)
    assert scene.notes.sent == [[(OTHER, EVERYTHING)]]


async def test_the_last_ones_go_out_before_it_closes(scene: Scene) -> None:
    scene.wakeups.inbox(OTHER, SessionKey(1))
    await scene.stop()
    assert scene.notes.sent == [[(OTHER, "i1")]]


async def test_it_closes_though_the_database_is_away(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_SECONDS", 0.05)
    scene.notes.free.clear()
    scene.wakeups.inbox(OTHER, SessionKey(1))
    async with asyncio.timeout(5):
        await scene.stop()
    await settle()
    assert scene.notes.running == 0


keys = st.frozensets(st.integers(0, 2**63 - 1).map(SessionKey), max_size=5)


@settings(deadline=None)
@given(inboxes=keys, ended=keys, streams=st.frozensets(st.uuids().map(StreamId), max_size=5))
def test_payloads_carry_ids_and_come_back_as_they_were(
    inboxes: frozenset[SessionKey], ended: frozenset[SessionKey], streams: frozenset[StreamId]
) -> None:
    aliases = frozenset(map(alias_of, streams))
    words = [f"i{key}" for key in inboxes] + [f"e{key}" for key in ended]
    for said in ([f"s{stream.hex}" for stream in streams], [f"t{alias}" for alias in aliases]):
        assert parse(",".join(words + said)) == Wake(inboxes, aliases, ended, junk=not words + said)


def test_everything_is_read() -> None:
    assert parse(EVERYTHING) == Wake(everything=True)


@pytest.mark.parametrize("word", ["", "x", "x12", "zzz", "?1:2"])
def test_words_of_a_newer_build_are_ignored(word: str) -> None:
    assert parse(f"i1,{word},e2") == Wake(frozenset({SessionKey(1)}), ended=frozenset({SessionKey(2)}), junk=1)


@pytest.mark.parametrize(
    "word",
    [
        *("i", "i1:2", "idle5", "s12", "s" + "g" * 32, "e1e", "e-", "i-1", "h1", "h1.", "i\u0661", "o ", "\0", "e1\n"),
        *(f"i{2**63}", f"e{2**64}", f"h1.{2**63}", f"h{2**63}.1", "i" + "9" * 5000, "e" + "0" * 7000),
    ],
)
def test_words_that_only_look_like_ours_cost_nobody_theirs(word: str) -> None:
    assert parse(f"i1,{word},e2") == Wake(frozenset({SessionKey(1)}), ended=frozenset({SessionKey(2)}), junk=1)


@settings(deadline=None)
@given(st.text() | st.from_regex("[iesho*p,.0-9a-f]{0,60}"))
def test_whatever_is_said_is_read(payload: str) -> None:
    wake = parse(payload)
    numbers = {*wake.inboxes, *wake.ended, *(number for each in wake.handed for number in (each.session, each.epoch))}
    assert all(0 <= number < 2**63 for number in numbers)
