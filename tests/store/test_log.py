"""The log: numbers, pages, sinks and ends of streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import asyncpg
import pytest

from pgmcp.types import ANONYMOUS, Attachment, Claimed, Cursor, StreamId
from tests.harness.stores import (
    IDS,
    Session,
    Store,
    answer,
    check_streams,
    opened,
    outcome,
    request,
    store,
)


@dataclass
class Scene:
    """An owner, an edge that carries a request's stream, and a connection of the test's."""

    owner: Store
    edge: Store
    session: Session
    claimed: Claimed
    stream: StreamId
    hand: asyncpg.Connection

    async def note(self, seq: int, message: bytes = b"note") -> object:
        """Append an event that finishes nothing."""
        entry = replace(answer(self.claimed, seq, message), finishes=None, outcome=None)
        return await outcome(self.owner.log.append(entry))

    async def attach(self, node: Store) -> Attachment:
        attachment = await node.log.attach(self.session.session_id, ANONYMOUS, self.stream)
        assert isinstance(attachment, Attachment)
        return attachment


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    hand = await asyncpg.connect(database, timeout=10)
    try:
        async with store(database) as owner, store(database) as edge:
            session = await opened(owner)
            accepted = await edge.inbox.accept([request(session)])
            assert accepted.stream is not None
            (claimed,) = await owner.inbox.claim(session.ownership)
            yield Scene(owner, edge, session, claimed, accepted.stream, hand)
    finally:
        await hand.close()


async def test_many_cursors_share_a_statement_and_get_their_own(scene: Scene) -> None:
    for seq in (1, 2, 3):
        await scene.note(seq)
    cursors = [Cursor(scene.stream, 1, after) for after in (0, 2, 3, 0)] + [Cursor(StreamId(IDS.uuid()), 1, 0)]
    pages = await asyncio.gather(*(scene.edge.log.read(cursor) for cursor in cursors))
    assert [[event.seq for event in page.events] for page in pages] == [[1, 2, 3], [3], [], [1, 2, 3], []]
    assert [page.attached for page in pages] == [True, True, True, True, False]


async def test_answers_of_one_batch_in_one_statement_close_it(scene: Scene) -> None:
    stream = StreamId(IDS.uuid())
    await scene.edge.inbox.accept([request(scene.session, rpc_id, stream=stream) for rpc_id in ("2", "3", "4")])
    claimed = await scene.owner.inbox.claim(scene.session.ownership)
    entries = [answer(item, seq) for seq, item in enumerate(claimed, start=1)]
    await asyncio.gather(*(scene.owner.log.append(entry) for entry in entries))
    [row] = await scene.hand.fetch("select unfinished, closed, next_seq from pgmcp.streams where id = $1", stream)
    assert tuple(row) == (0, True, 4)


async def test_numbers_have_no_gap_when_one_entry_of_a_group_is_refused(scene: Scene) -> None:
    """An answer that finishes nothing refuses its stream's part of the group, and no other stream's."""
    await scene.edge.inbox.accept([request(scene.session, "2")])
    (other,) = await scene.owner.inbox.claim(scene.session.ownership)
    bad = replace(answer(scene.claimed, 2), finishes=other.key)
    await asyncio.gather(scene.note(1), outcome(scene.owner.log.append(bad)), scene.owner.log.append(answer(other)))
    await check_streams(scene.hand)
    assert await scene.hand.fetchval("select finished_at from pgmcp.requests where id = $1", scene.claimed.key) is None
