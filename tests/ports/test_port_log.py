"""``Log``: numbers, pages, sinks and ends of streams."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

from pgmcp.errors import Fenced, OutOfStep, StreamTaken
from pgmcp.types import (
    ANONYMOUS,
    JUMP,
    PAGE,
    PAGE_BYTES,
    REPLACEMENTS,
    Attachment,
    Claimed,
    Cursor,
    Entry,
    NodeState,
    SessionFacts,
    Stand,
    StreamId,
    StreamKind,
)
from tests.harness.stores import IDS, Session, answer, opened, outcome, request
from tests.ports.benches import Bench, Pair, Ports


@dataclass
class Scene:
    """An owner, and an edge that carries a request's stream."""

    bench: Bench
    owner: Ports
    edge: Ports
    session: Session
    claimed: Claimed
    stream: StreamId

    async def note(self, seq: int, message: bytes = b"note") -> object:
        """Append an event that finishes nothing."""
        entry = replace(answer(self.claimed, seq, message), finishes=None, outcome=None)
        return await outcome(self.owner.log.append(entry))

    async def attach(self, node: Ports) -> Attachment:
        attachment = await node.log.attach(self.session.session_id, ANONYMOUS, self.stream)
        assert isinstance(attachment, Attachment)
        return attachment


@pytest.fixture
async def scene(pair: Pair) -> Scene:
    accepted = await pair.two.inbox.accept([request(pair.session)])
    assert accepted.stream is not None
    (claimed,) = await pair.one.inbox.claim(pair.session.ownership)
    return Scene(pair.bench, pair.one, pair.two, pair.session, claimed, accepted.stream)


async def test_an_append_names_the_sink(scene: Scene) -> None:
    assert await scene.note(1) == scene.edge.node
    await scene.edge.log.release(Cursor(scene.stream, 1, 1))
    assert await scene.note(2) is None
    await scene.attach(scene.owner)
    assert await scene.note(3) == scene.owner.node


@pytest.mark.parametrize("message", [b"", b"1\0", b"\xff\xfe", b'"\\u0000"', b"x" * 3_000_000], ids=len)
async def test_messages_survive_byte_for_byte(scene: Scene, message: bytes) -> None:
    await scene.note(1, message)
    cursor = Cursor(scene.stream, 1, 0)
    (event,) = (await scene.edge.log.read(cursor)).events
    assert event.size == len(message)
    found = event.message
    while len(found) < event.size:
        piece = await scene.edge.log.read_on(cursor, len(found))
        assert piece
        found += piece
    assert found == message


async def test_a_large_event_is_its_sinks_only_to_the_last_piece(scene: Scene) -> None:
    cursor = Cursor(scene.stream, 1, 0)
    await scene.note(1, b"x" * (PAGE_BYTES + 7))
    (event,) = (await scene.edge.log.read(cursor)).events
    assert (len(event.message), event.rest) == (PAGE_BYTES, 7)
    assert await scene.edge.log.read_on(cursor, PAGE_BYTES) == b"x" * 7
    assert await scene.owner.log.read_on(cursor, PAGE_BYTES) is None
    await scene.attach(scene.edge)
    assert await scene.edge.log.read_on(cursor, PAGE_BYTES) is None


async def test_pages_follow_the_cursor_to_the_end(scene: Scene) -> None:
    await asyncio.gather(*(scene.note(seq) for seq in range(1, PAGE + 2)))
    await scene.owner.log.append(answer(scene.claimed, PAGE + 2))
    first = await scene.edge.log.read(Cursor(scene.stream, 1, 0))
    assert [event.seq for event in first.events] == list(range(1, PAGE + 1))
    assert not first.closed
    rest = await scene.edge.log.read(Cursor(scene.stream, 1, PAGE))
    assert [event.seq for event in rest.events] == [PAGE + 1, PAGE + 2]
    assert rest.closed
    end = await scene.edge.log.read(Cursor(scene.stream, 1, PAGE + 2))
    assert (end.attached, end.closed, end.events) == (True, True, ())


async def test_a_replaced_sink_reads_nothing_more(scene: Scene) -> None:
    await scene.note(1)
    attachment = await scene.attach(scene.owner)
    assert (attachment.kind, attachment.sink_epoch, attachment.next_seq) == (StreamKind.REQUEST, 2, 2)
    assert attachment.replaced == scene.edge.node
    assert not (await scene.edge.log.read(Cursor(scene.stream, 1, 0))).attached
    await scene.edge.log.release(Cursor(scene.stream, 1, 1))  # must not take it from the new one
    assert (await scene.owner.log.read(Cursor(scene.stream, 2, 0))).attached


async def test_two_sinks_of_one_node_are_told_apart(scene: Scene) -> None:
    attachment = await scene.attach(scene.edge)
    assert attachment.replaced == scene.edge.node
    assert not (await scene.edge.log.read(Cursor(scene.stream, 1, 0))).attached
    assert (await scene.edge.log.read(Cursor(scene.stream, 2, 0))).attached


async def test_of_sinks_that_come_at_once_one_is_left(scene: Scene) -> None:
    attachments = await asyncio.gather(*(scene.attach(node) for node in (scene.owner, scene.edge) * 4))
    epochs = sorted(attachment.sink_epoch for attachment in attachments)
    assert epochs == list(range(2, 10))
    pages = [
        await node.log.read(Cursor(scene.stream, attachment.sink_epoch, 0))
        for node, attachment in zip((scene.owner, scene.edge) * 4, attachments, strict=True)
    ]
    assert [page.attached for page in pages].count(True) == 1


async def test_a_stream_that_is_not_there_gives_the_facts_only(scene: Scene) -> None:
    stranger = await opened(scene.owner)
    for stream in (StreamId(IDS.uuid()), stranger.standalone):
        facts = await scene.edge.log.attach(scene.session.session_id, ANONYMOUS, stream)
        assert isinstance(facts, SessionFacts)
        assert facts.owner == scene.owner.node


async def test_a_node_is_told_which_streams_are_its_own(scene: Scene) -> None:
    assert await scene.edge.log.carried() == {(scene.stream, 1)}
    assert await scene.owner.log.carried() == set()
    attachment = await scene.attach(scene.owner)
    assert await scene.edge.log.carried() == set()
    assert await scene.owner.log.carried() == {(scene.stream, attachment.sink_epoch)}
    await scene.owner.log.release(Cursor(scene.stream, attachment.sink_epoch, 0))
    assert await scene.owner.log.carried() == set()


async def test_the_standalone_stream_is_found_without_its_id(scene: Scene) -> None:
    entry = Entry(scene.session.ownership, scene.session.standalone, 1, b"news")
    assert await scene.owner.log.append(entry) is None
    attachment = await scene.edge.log.attach(scene.session.session_id, ANONYMOUS, None)
    assert isinstance(attachment, Attachment)
    assert (attachment.stream, attachment.next_seq, attachment.replaced) == (scene.session.standalone, 2, None)
    again = await scene.owner.log.attach(scene.session.session_id, ANONYMOUS, None)
    assert isinstance(again, Attachment)
    assert (again.stream, again.next_seq) == (scene.session.standalone, 2)


async def test_a_stream_closes_with_its_last_answer(scene: Scene) -> None:
    stream = StreamId(IDS.uuid())
    await scene.edge.inbox.accept([request(scene.session, rpc_id, stream=stream) for rpc_id in ("2", "3")])
    first, second = await scene.owner.inbox.claim(scene.session.ownership)
    await scene.owner.log.append(answer(first, 1))
    assert not (await scene.edge.log.read(Cursor(stream, 1, 1))).closed
    await scene.owner.log.append(answer(second, 2))
    assert (await scene.edge.log.read(Cursor(stream, 1, 2))).closed
    assert isinstance(await outcome(scene.owner.log.append(Entry(first.ownership, stream, 3, b"late"))), OutOfStep)
    await scene.bench.check_streams()


async def test_a_release_goes_only_forward(scene: Scene) -> None:
    await scene.note(1)
    await scene.note(2)
    await scene.edge.log.release(Cursor(scene.stream, 1, 2))
    attachment = await scene.attach(scene.edge)
    assert attachment.delivered_seq == 2
    await scene.edge.log.release(Cursor(scene.stream, attachment.sink_epoch, 0))
    assert (await scene.attach(scene.edge)).delivered_seq == 2


async def test_a_dropped_sink_reads_nothing_more(scene: Scene) -> None:
    assert await scene.owner.log.drop_sink(scene.session.ownership, scene.stream) == (scene.stream, scene.edge.node)
    assert not (await scene.edge.log.read(Cursor(scene.stream, 1, 0))).attached
    assert await scene.note(1) is None
    assert (await scene.attach(scene.edge)).next_seq == 2
    assert (await scene.bench.counts())["events"] == 1


async def test_it_is_said_where_streams_stand_and_which_there_are(scene: Scene) -> None:
    await scene.note(1)
    nowhere = StreamId(IDS.uuid())
    assert await scene.edge.log.stands([scene.stream, scene.session.standalone, nowhere]) == {
        scene.stream: Stand(2, closed=False),
        scene.session.standalone: Stand(1, closed=False),
    }
    assert await scene.edge.log.stands([]) == {}
    assert [await scene.edge.log.knows(stream) for stream in (scene.stream, nowhere)] == [True, False]


async def test_when_a_term_begins_the_numbers_of_open_streams_jump(scene: Scene) -> None:
    done = StreamId(IDS.uuid())
    await scene.edge.inbox.accept([request(scene.session, "2", stream=done)])
    (other,) = await scene.owner.inbox.claim(scene.session.ownership)
    await scene.owner.log.append(answer(other))
    await scene.bench.fail_over()
    assert await scene.owner.log.stands([scene.stream, done]) == {
        scene.stream: Stand(1 + JUMP, closed=False),
        done: Stand(2, closed=True),
    }
    late = await outcome(scene.owner.log.append(answer(scene.claimed, 1)))
    assert isinstance(late, Fenced)
    now = replace(scene.session.ownership, epoch=scene.session.ownership.epoch + JUMP)
    await scene.owner.inbox.keep_claims([now], [scene.claimed.key])
    await scene.owner.log.append(answer(replace(scene.claimed, ownership=now), 1 + JUMP))
    assert await scene.edge.log.stands([scene.stream]) == {scene.stream: Stand(2 + JUMP, closed=True)}


async def listens(node: Ports, session: Session) -> int | None:
    """Listen to the session's standalone stream; the turn as its sink, None when it was refused."""
    attachment = await outcome(node.log.attach(session.session_id, ANONYMOUS, None))
    if isinstance(attachment, StreamTaken):
        return None
    assert isinstance(attachment, Attachment)
    return attachment.sink_epoch


async def test_listeners_that_displace_each_other_are_refused(scene: Scene) -> None:
    first, *others = [await listens(node, scene.session) for node in (scene.owner, scene.edge) * (REPLACEMENTS + 1)]
    assert first == 2
    assert others == [*range(3, REPLACEMENTS + 3), *[None] * (REPLACEMENTS + 1)]
    # the stream stays with the last of them, and is free when that has let go
    stream, holder = scene.session.standalone, (scene.owner, scene.edge)[REPLACEMENTS % 2]
    assert (await holder.log.read(Cursor(stream, REPLACEMENTS + 2, 0))).attached
    await holder.log.release(Cursor(stream, REPLACEMENTS + 2, 0))
    assert await listens(scene.owner, scene.session) == REPLACEMENTS + 3


async def test_of_many_listeners_at_once_few_displace_others(scene: Scene) -> None:
    turns = await asyncio.gather(*(listens(node, scene.session) for node in (scene.owner, scene.edge) * 4))
    assert sorted(turn for turn in turns if turn is not None) == list(range(2, REPLACEMENTS + 3))


async def test_who_comes_back_after_a_broken_connection_displaces_nobody(scene: Scene) -> None:
    for turn in range(2, 2 + 3 * REPLACEMENTS):
        assert await listens(scene.edge, scene.session) == turn
        await scene.edge.log.release(Cursor(scene.session.standalone, turn, 0))


async def test_the_sinks_of_dead_nodes_are_not_displaced(scene: Scene) -> None:
    for turn in range(2, 2 + 2 * REPLACEMENTS):
        passing = await scene.bench.node()
        assert await listens(passing, scene.session) == turn
        await passing.lease.set_state(NodeState.LEFT)
