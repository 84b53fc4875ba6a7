"""G1: no owner write is stored under an ownership that is over, wherever the write is held up.

Each test holds a statement at one row lock that it takes, lets the ownership change as far as it can meanwhile, lets
go, and compares: what the session held when the change was committed is what it holds when the write has settled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import asyncpg
import pytest

from pgmcp.errors import Fenced, OutOfStep, SessionUnknown
from pgmcp.types import ANONYMOUS, Claimed, Entry, Established, JournalEntry, RequestKey
from tests.harness.stores import (
    HELD,
    IDS,
    Session,
    Store,
    Watcher,
    answer,
    check_streams,
    opened,
    outcome,
    request,
    row_counts,
    rows_of,
    store,
    take_over,
)

through_both = pytest.mark.usefixtures("either_way")

ROWS = {
    "session": "select from pgmcp.sessions where id = $1 for update",
    "stream": "select from pgmcp.streams where session = $1 for update",
    "request": "select from pgmcp.requests where session = $1 for update",
    "journal": "select from pgmcp.journal where session = $1 for update",
}


@dataclass
class Scene:
    """A session of ``owner`` with one claimed and one waiting request, a second node, and two hands of the test's."""

    owner: Store
    other: Store
    session: Session
    claimed: Claimed
    holder: asyncpg.Connection
    taker: asyncpg.Connection
    watcher: Watcher

    async def change_owner(self) -> dict[str, list[tuple[Any, ...]]]:
        """Take the session over; what it held when that was committed."""
        async with self.taker.transaction():
            await take_over(self.taker, self.session.key, self.other.node)
        return await rows_of(self.taker, self.session.key)

    async def end(self) -> dict[str, list[tuple[Any, ...]]]:
        """End the session as its client does; what was left of it then."""
        await outcome(self.other.inbox.end(self.session.session_id, ANONYMOUS))
        return await rows_of(self.taker, self.session.key)


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    holder, taker, eyes = [await asyncpg.connect(database, timeout=10) for _ in range(3)]
    try:
        async with store(database) as owner, store(database) as other:
            session = await opened(owner)
            await owner.inbox.write_journal(session.ownership, JournalEntry("level", "", b"before"), 1)
            await owner.inbox.accept([request(session)])
            (claimed,) = await owner.inbox.claim(session.ownership)
            await owner.inbox.accept([request(session, "2")])
            yield Scene(owner, other, session, claimed, holder, taker, Watcher(eyes))
    finally:
        for connection in (holder, taker, eyes):
            await connection.close()


@asynccontextmanager
async def held(scene: Scene, row: str) -> AsyncIterator[None]:
    """Keep the session's rows of one kind locked."""
    async with scene.holder.transaction():
        await scene.holder.execute(ROWS[row].replace("$1", str(scene.session.key)))
        yield


async def claim(scene: Scene) -> object:
    return await scene.owner.inbox.claim(scene.session.ownership)


async def append(scene: Scene) -> object:
    return await scene.owner.log.append(replace(answer(scene.claimed), finishes=None, outcome=None))


async def finish(scene: Scene) -> object:
    return await scene.owner.log.append(answer(scene.claimed))


async def establish(scene: Scene) -> None:
    facts = Established("2025-11-25", "late", "1", b"{}")
    await scene.owner.inbox.establish(scene.session.ownership, facts, 2)


async def write_journal(scene: Scene) -> None:
    await scene.owner.inbox.write_journal(scene.session.ownership, JournalEntry("level", "", b"late"), 2)


async def forget_journal(scene: Scene) -> None:
    await scene.owner.inbox.write_journal(scene.session.ownership, JournalEntry("level", ""), 2)


async def drop_sink(scene: Scene) -> object:
    return await scene.owner.log.drop_sink(scene.session.ownership, scene.claimed.stream)


async def end_owned(scene: Scene) -> None:
    await scene.owner.inbox.end_owned(scene.session.ownership)


Write = Callable[[Scene], Awaitable[object]]
WRITES: list[tuple[Write, str]] = [
    (claim, "session"),
    (claim, "request"),
    (append, "session"),
    (append, "stream"),
    (finish, "session"),
    (finish, "stream"),
    (finish, "request"),
    (establish, "session"),
    (write_journal, "session"),
    (write_journal, "journal"),
    (forget_journal, "session"),
    (forget_journal, "journal"),
    (drop_sink, "session"),
    (drop_sink, "stream"),
    (end_owned, "session"),
    (end_owned, "stream"),
    (end_owned, "request"),
    (end_owned, "journal"),
]
OVER_A_DELETE = {(end_owned, row) for row in ("stream", "request", "journal")}
"""A DELETE that has the session's row keeps it: no takeover comes between."""


def cases(writes: list[tuple[Write, str]]) -> pytest.MarkDecorator:
    named = [pytest.param(write, row, id=f"{write.__name__}-{row}") for write, row in writes]
    return pytest.mark.parametrize(("write", "row"), named)


at_each_row = cases(WRITES)
at_the_session = cases([case for case in WRITES if case[1] == "session"])
at_other_rows = cases([case for case in WRITES if case[1] != "session" and case not in OVER_A_DELETE])


def is_over(result: object, write: Write) -> bool:
    """Whether the write says that its ownership is over; one write says it by saying nothing."""
    return isinstance(result, Fenced) or (write is drop_sink and result is None)


@through_both
@at_the_session
async def test_a_write_that_waits_for_the_takeover_stores_nothing(scene: Scene, write: Write, row: str) -> None:
    async with scene.holder.transaction():
        await take_over(scene.holder, scene.session.key, scene.other.node)
        late = asyncio.ensure_future(write(scene))
        await scene.watcher.until_waiting("/* ", late)
    at_takeover = await rows_of(scene.taker, scene.session.key)
    assert is_over(await outcome(late), write)
    assert await rows_of(scene.taker, scene.session.key) == at_takeover
    await check_streams(scene.taker)


@through_both
@at_each_row
async def test_a_write_held_at_a_row_is_stored_before_the_takeover_or_not_at_all(
    scene: Scene, write: Write, row: str
) -> None:
    async with held(scene, row):
        late = asyncio.ensure_future(write(scene))
        await scene.watcher.until_waiting("/* ", late)
        change = asyncio.ensure_future(scene.change_owner())
        await scene.watcher.until_waiting("for update", change)
    at_takeover = await change
    result = await outcome(late)
    assert await rows_of(scene.taker, scene.session.key) == at_takeover
    if isinstance(result, Fenced):
        assert at_takeover["events"] == []
        assert at_takeover["journal"][0][3] == b"before"
    elif write is end_owned:
        assert all(rows == [] for rows in at_takeover.values())
    await check_streams(scene.taker)


@through_both
@at_other_rows
async def test_a_write_held_until_it_gives_way_is_not_stored_after_the_takeover(
    scene: Scene, write: Write, row: str
) -> None:
    """The row stays locked longer than a write waits at a lock: the takeover gets through between two of its tries."""
    async with held(scene, row):
        late = asyncio.ensure_future(write(scene))
        await scene.watcher.until_waiting("/* ", late)
        at_takeover = await scene.change_owner()
    assert is_over(await outcome(late), write)
    assert await rows_of(scene.taker, scene.session.key) == at_takeover
    await check_streams(scene.taker)


@at_each_row
async def test_nothing_is_left_of_an_ended_session(scene: Scene, write: Write, row: str) -> None:
    async with held(scene, row):
        late = asyncio.ensure_future(write(scene))
        await scene.watcher.until_waiting("/* ", late)
        end = asyncio.ensure_future(scene.end())
        await scene.watcher.until_waiting("end_session", end)
    assert await end == {table: [] for table in HELD}
    await outcome(late)
    assert await row_counts(scene.taker) == dict.fromkeys(HELD, 0)


@at_the_session
async def test_a_write_that_waits_for_the_end_stores_nothing(scene: Scene, write: Write, row: str) -> None:
    async with scene.holder.transaction():
        await scene.holder.execute(f"delete from pgmcp.sessions where id = {scene.session.key}")
        late = asyncio.ensure_future(write(scene))
        await scene.watcher.until_waiting("/* ", late)
    result = await outcome(late)
    assert is_over(result, write) or (write is end_owned and result is None)  # it wanted what has come
    assert await row_counts(scene.taker) == dict.fromkeys(HELD, 0)


@through_both
async def test_a_group_stores_what_is_still_owned_and_refuses_the_rest(scene: Scene) -> None:
    """One statement carries entries of two sessions; one of them goes to another owner while it waits."""
    kept = await opened(scene.owner)
    await scene.owner.inbox.accept([request(kept)])
    (mine,) = await scene.owner.inbox.claim(kept.ownership)
    async with scene.holder.transaction():
        await take_over(scene.holder, scene.session.key, scene.other.node)
        both = [asyncio.ensure_future(scene.owner.log.append(answer(item))) for item in (scene.claimed, mine)]
        await scene.watcher.until_waiting("append", both[0])
    results = [await outcome(task) for task in both]
    assert isinstance(results[0], Fenced)
    assert results[1] == scene.owner.node
    assert (await row_counts(scene.taker))["events"] == 1


async def test_an_answer_finishes_only_what_was_claimed_in_its_epoch(scene: Scene) -> None:
    """The new owner reads its own epoch everywhere: a claim of the old one is not finished by a plain answer."""
    after = await scene.change_owner()
    ownership = replace(scene.session.ownership, epoch=2)
    late = replace(answer(scene.claimed), ownership=ownership)
    assert isinstance(await outcome(scene.other.log.append(late)), OutOfStep)
    assert await rows_of(scene.taker, scene.session.key) == after


async def test_a_request_is_finished_once(scene: Scene) -> None:
    await scene.owner.log.append(answer(scene.claimed))
    again = answer(scene.claimed, scene.claimed.next_seq + 1)
    assert isinstance(await outcome(scene.owner.log.append(again)), OutOfStep)
    unknown = Entry(scene.session.ownership, scene.session.standalone, 1, b"x", RequestKey(IDS.uuid()))
    assert isinstance(await outcome(scene.owner.log.append(unknown)), OutOfStep)
    assert (await row_counts(scene.taker))["events"] == 1


async def test_no_number_is_skipped_or_used_twice(scene: Scene) -> None:
    first = replace(answer(scene.claimed), finishes=None, outcome=None)
    for seq in (2, 0):
        assert isinstance(await outcome(scene.owner.log.append(replace(first, seq=seq))), OutOfStep)
    await scene.owner.log.append(first)
    assert isinstance(await outcome(scene.owner.log.append(replace(first, seq=3))), OutOfStep)
    await check_streams(scene.taker)


async def test_a_stream_takes_events_of_its_own_session_only(scene: Scene) -> None:
    stranger = await opened(scene.owner)
    entry = Entry(stranger.ownership, scene.session.standalone, 1, b"astray")
    assert isinstance(await outcome(scene.owner.log.append(entry)), OutOfStep)
    assert (await row_counts(scene.taker))["events"] == 0


# Accepting belongs to no owner, and is ordered with every change of owner all the same.


@through_both
async def test_accepting_beside_a_takeover_returns_the_owner_that_holds_after_it(scene: Scene) -> None:
    async with scene.holder.transaction():
        await take_over(scene.holder, scene.session.key, scene.other.node)
        call = asyncio.ensure_future(scene.owner.inbox.accept([request(scene.session, "3")]))
        await scene.watcher.until_waiting("accept", call)
    accepted = await outcome(call)
    assert (accepted.facts.owner, accepted.facts.epoch) == (scene.other.node, 2)


async def test_a_takeover_sees_what_was_accepted_before_it(scene: Scene) -> None:
    """An edge is told the old owner only if the new one reads the message after its lock."""
    message = request(scene.session, "3")
    rival = scene.holder.transaction()
    await rival.start()  # its insert keeps the accept waiting where it has the session's row already
    await scene.holder.execute(
        "insert into pgmcp.requests (id, session, rpc_id, body, context, open) "
        f"values (gen_random_uuid(), {scene.session.key}, '3', '', '', true)"
    )
    call = asyncio.ensure_future(scene.owner.inbox.accept([message]))
    await scene.watcher.until_waiting("accept", call)
    change = asyncio.ensure_future(scene.change_owner())
    await scene.watcher.until_waiting("for update", change)
    await rival.rollback()
    accepted, seen = await outcome(call), await change
    told_before = message.key in [row[0] for row in seen["requests"]]
    assert accepted.facts.owner == (scene.owner.node if told_before else scene.other.node)


async def test_accepting_beside_the_end_leaves_nothing(scene: Scene) -> None:
    async with scene.holder.transaction():
        await scene.holder.execute(f"delete from pgmcp.sessions where id = {scene.session.key}")
        call = asyncio.ensure_future(scene.owner.inbox.accept([request(scene.session, "3")]))
        await scene.watcher.until_waiting("accept", call)
    assert isinstance(await outcome(call), SessionUnknown)
    assert await row_counts(scene.taker) == dict.fromkeys(HELD, 0)


async def test_the_end_waits_for_an_accept_and_takes_it_along(scene: Scene) -> None:
    async with held(scene, "session"):
        await scene.holder.execute(
            f"insert into pgmcp.streams (id, session, kind) values (gen_random_uuid(), {scene.session.key}, 'request')"
        )
        end = asyncio.ensure_future(scene.end())
        await scene.watcher.until_waiting("end_session", end)
    await end
    assert await row_counts(scene.taker) == dict.fromkeys(HELD, 0)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "standalone"])
async def test_attaching_beside_the_end_finds_no_session(scene: Scene, stream: bool) -> None:
    target = scene.claimed.stream if stream else None
    async with scene.holder.transaction():
        await scene.holder.execute(f"delete from pgmcp.sessions where id = {scene.session.key}")
        call = asyncio.ensure_future(scene.other.log.attach(scene.session.session_id, ANONYMOUS, target))
        await scene.watcher.until_waiting("attach", call)
    assert isinstance(await outcome(call), SessionUnknown)
    assert await row_counts(scene.taker) == dict.fromkeys(HELD, 0)


async def test_the_newest_sink_wins_and_the_replaced_one_reads_nothing(scene: Scene) -> None:
    """An attach that waited for another one comes after it, and says whom it replaced."""
    target = scene.claimed.stream
    async with held(scene, "stream"):
        await scene.holder.execute(
            f"update pgmcp.streams set sink = '{IDS.uuid()}', sink_epoch = 9 where id = '{target}'"
        )
        call = asyncio.ensure_future(scene.other.log.attach(scene.session.session_id, ANONYMOUS, target))
        await scene.watcher.until_waiting("attach", call)
    attachment = await outcome(call)
    assert attachment.sink_epoch == 10
    assert attachment.replaced not in {scene.owner.node, scene.other.node, None}
