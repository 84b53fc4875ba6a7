"""Every write may be repeated: a connection that breaks before the query or after the commit changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, replace
from typing import Any

import asyncpg
import pytest

from pgmcp.errors import DatabaseUnavailable
from pgmcp.store.group_commit import GroupCommit
from pgmcp.store.statements import statement
from pgmcp.types import ANONYMOUS, Attachment, Claimed, Cursor, Established, JournalEntry, NewSession, Stand, StreamId
from tests.harness.proxy import Cut, Proxy, proxied
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
    store,
)

through_both = pytest.mark.usefixtures("either_way")
each_cut = pytest.mark.parametrize("where", [Cut.BEFORE, Cut.AFTER], ids=["before", "after"])


@dataclass
class Scene:
    """One node whose connections go through the proxy, its session with a claimed request, and eyes past the proxy."""

    proxy: Proxy
    node: Store
    session: Session
    claimed: Claimed
    eyes: asyncpg.Connection
    hand: asyncpg.Connection

    async def through(self, name: str, where: Cut, call: Awaitable[Any]) -> Any:
        """Run a call whose statement meets a cut connection."""
        self.proxy.cut(name, where)
        result = await outcome(call)
        assert self.proxy.pending == []
        await check_streams(self.eyes)
        return result

    async def beside(self, name: str, call: Awaitable[Any]) -> Any:
        """Run a call whose first try loses its reply while PostgreSQL is still committing it."""
        watcher, again, first = Watcher(self.eyes), self.node.database.fetch, self.hand.transaction()
        tries = 0

        async def fetch(asked: str, *args: object, **more: Any) -> list[asyncpg.Record]:
            nonlocal tries
            tries += asked == name
            if asked != name or tries > 1:
                return await again(asked, *args, **more)
            await first.start()
            await self.hand.fetch(statement(name, "pgmcp"), *args)
            raise ConnectionResetError

        self.node.database.fetch = fetch  # type: ignore[method-assign,assignment]
        repeated = asyncio.ensure_future(outcome(call))
        await watcher.until_waiting(f"/* {name} */", repeated)
        await first.commit()
        return await repeated


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    eyes, hand = [await asyncpg.connect(database, timeout=10) for _ in range(2)]
    try:
        async with proxied(database) as (proxy, address), store(address) as node:
            session = await opened(node)
            await node.inbox.accept([request(session)])
            (claimed,) = await node.inbox.claim(session.ownership)
            yield Scene(proxy, node, session, claimed, eyes, hand)
    finally:
        await eyes.close()
        await hand.close()


async def test_the_proxy_cuts_where_it_says(scene: Scene) -> None:
    """The control: without a second try the write is there after one cut, and not after the other."""
    for where, there in ((Cut.BEFORE, 0), (Cut.AFTER, 2)):
        scene.proxy.cut("write_journal", where)
        args = (scene.session.key, scene.node.node, 1, "level", "", b"x", 1)
        with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            await scene.node.database.fetch("write_journal", *args)
        assert (await row_counts(scene.eyes))["journal"] == there


@through_both
@each_cut
async def test_open_session(scene: Scene, where: Cut) -> None:
    new = NewSession(IDS.token(), ANONYMOUS, "streamable", StreamId(IDS.uuid()))
    ownership = await scene.through("open_session", where, scene.node.inbox.open_session(new))
    assert ownership.epoch == 1
    assert await scene.node.log.stands([new.standalone]) == {new.standalone: Stand(1, closed=False)}
    assert (await row_counts(scene.eyes))["sessions"] == 2


@through_both
@each_cut
@pytest.mark.parametrize("rpc_id", ["2", None], ids=["request", "notification"])
async def test_accept(scene: Scene, where: Cut, rpc_id: str | None) -> None:
    message = request(scene.session, rpc_id)
    accepted = await scene.through("accept", where, scene.node.inbox.accept([message]))
    assert (accepted.stream, accepted.joined) == (message.stream, False)
    assert [item.key for item in await scene.node.inbox.claim(scene.session.ownership)] == [message.key]
    assert (await row_counts(scene.eyes))["requests"] == 2


@each_cut
async def test_accept_of_a_batch(scene: Scene, where: Cut) -> None:
    stream = StreamId(IDS.uuid())
    batch = [
        request(scene.session, "2", stream=stream),
        request(scene.session, None),
        request(scene.session, "3", stream=stream),
    ]
    accepted = await scene.through("accept", where, scene.node.inbox.accept(batch))
    assert (accepted.stream, accepted.joined) == (stream, False)
    assert await scene.eyes.fetchval("select unfinished from pgmcp.streams where id = $1", stream) == 2
    assert (await row_counts(scene.eyes))["requests"] == 4


@through_both
@each_cut
async def test_claim(scene: Scene, where: Cut) -> None:
    messages = [request(scene.session, "2"), request(scene.session, None), request(scene.session, "3")]
    for message in messages:
        await scene.node.inbox.accept([message])
    claimed = await scene.through("claim", where, scene.node.inbox.claim(scene.session.ownership))
    assert [item.key for item in claimed] == [message.key for message in messages]
    assert await scene.eyes.fetchval("select max(runs) from pgmcp.requests") == 1
    assert await scene.node.inbox.claim(scene.session.ownership) == []


@through_both
@each_cut
@pytest.mark.parametrize("finishing", [False, True], ids=["event", "answer"])
async def test_append(scene: Scene, where: Cut, finishing: bool) -> None:
    entry = answer(scene.claimed)
    if not finishing:
        entry = replace(entry, finishes=None, outcome=None)
    assert await scene.through("append", where, scene.node.log.append(entry)) == scene.node.node
    assert (await row_counts(scene.eyes))["events"] == 1
    [row] = await scene.eyes.fetch("select unfinished, closed, next_seq from pgmcp.streams where id = $1", entry.stream)
    assert tuple(row) == (0 if finishing else 1, finishing, 2)


@through_both
@each_cut
async def test_append_of_a_group(scene: Scene, where: Cut) -> None:
    """The first append holds the group's turn, the others are one statement, which is repeated whole."""
    plain = replace(answer(scene.claimed), finishes=None, outcome=None)
    scene.proxy.cut("append", where)
    scene.proxy.cut("append", where)
    entries = [replace(plain, seq=seq) for seq in (1, 2, 3)] + [answer(scene.claimed, 4)]
    results = await asyncio.gather(*(outcome(scene.node.log.append(entry)) for entry in entries))
    assert results == [scene.node.node] * 4
    await check_streams(scene.eyes)
    assert (await row_counts(scene.eyes))["events"] == 4


@each_cut
async def test_establish(scene: Scene, where: Cut) -> None:
    facts = Established("2025-11-25", "client", "1", b"{}")
    assert (
        await scene.through("establish", where, scene.node.inbox.establish(scene.session.ownership, facts, 1)) is None
    )
    assert (await scene.node.inbox.find(scene.session.session_id, ANONYMOUS)).protocol_version == "2025-11-25"


@each_cut
async def test_write_journal(scene: Scene, where: Cut) -> None:
    for version, body in ((1, b"one"), (2, b"two"), (3, None)):
        write = scene.node.inbox.write_journal(scene.session.ownership, JournalEntry("level", "", body), version)
        assert await scene.through("write_journal", where, write) is None
        assert await scene.eyes.fetchval("select body from pgmcp.journal where kind = 'level'") == body


@each_cut
async def test_attach(scene: Scene, where: Cut) -> None:
    call = scene.node.log.attach(scene.session.session_id, ANONYMOUS, scene.claimed.stream)
    attachment = await scene.through("attach", where, call)
    assert isinstance(attachment, Attachment)
    page = await scene.node.log.read(Cursor(attachment.stream, attachment.sink_epoch, 0))
    assert (page.attached, page.events) == (True, ())


@each_cut
async def test_release(scene: Scene, where: Cut) -> None:
    await scene.node.log.append(answer(scene.claimed))
    assert scene.claimed.stream is not None
    await scene.through("release", where, scene.node.log.release(Cursor(scene.claimed.stream, 1, 1)))
    [row] = await scene.eyes.fetch(
        "select s.sink, s.delivered_seq, r.open from pgmcp.streams s join pgmcp.requests r on r.stream = s.id"
    )
    assert tuple(row) == (None, 1, False)


@each_cut
async def test_a_note_says_that_the_sink_is_kept(scene: Scene, where: Cut) -> None:
    await scene.node.log.append(answer(scene.claimed))
    assert scene.claimed.stream is not None
    note = scene.node.log.release(Cursor(scene.claimed.stream, 1, 1), keep=True)
    assert await scene.through("release", where, note) is True
    assert await scene.node.log.release(Cursor(scene.claimed.stream, 2, 1), keep=True) is False


@each_cut
async def test_drop_sink(scene: Scene, where: Cut) -> None:
    call = scene.node.log.drop_sink(scene.session.ownership, scene.claimed.stream)
    stream, _ = await scene.through("drop_sink", where, call)
    assert stream == scene.claimed.stream
    assert await scene.eyes.fetchval("select sink from pgmcp.streams where id = $1", stream) is None


async def test_drop_sink_names_the_sink_after_a_lost_reply(scene: Scene) -> None:
    call = scene.node.log.drop_sink(scene.session.ownership, scene.claimed.stream)
    assert await scene.through("drop_sink", Cut.AFTER, call) == (scene.claimed.stream, scene.node.node)


@each_cut
async def test_end(scene: Scene, where: Cut) -> None:
    call = scene.node.inbox.end(scene.session.session_id, ANONYMOUS)
    assert await scene.through("end_session", where, call) == scene.session.key
    assert await row_counts(scene.eyes) == dict.fromkeys(HELD, 0)


async def test_end_owned_after_a_lost_reply_succeeds(scene: Scene) -> None:
    call = scene.node.inbox.end_owned(scene.session.ownership)
    assert await scene.through("end_owned_session", Cut.AFTER, call) is None


# A first try whose reply was lost may still be committing when its repeat begins: a slow disk, a synchronous standby.


async def test_open_session_beside_its_own_first_try(scene: Scene) -> None:
    new = NewSession(IDS.token(), ANONYMOUS, "streamable", StreamId(IDS.uuid()))
    ownership = await scene.beside("open_session", scene.node.inbox.open_session(new))
    assert ownership.epoch == 1


async def test_write_journal_beside_its_own_first_try(scene: Scene) -> None:
    entry = JournalEntry("level", "", b"x")
    assert (
        await scene.beside("write_journal", scene.node.inbox.write_journal(scene.session.ownership, entry, 1)) is None
    )
    assert await scene.eyes.fetchval("select body from pgmcp.journal where kind = 'level'") == b"x"


@pytest.mark.parametrize("finishing", [False, True], ids=["event", "answer"])
async def test_append_beside_its_own_first_try(scene: Scene, finishing: bool) -> None:
    entry = answer(scene.claimed)
    if not finishing:
        entry = replace(entry, finishes=None, outcome=None)
    assert await scene.beside("append", scene.node.log.append(entry)) == scene.node.node
    await check_streams(scene.eyes)


async def test_claim_beside_its_own_first_try(scene: Scene) -> None:
    message = request(scene.session, "2")
    await scene.node.inbox.accept([message])
    claimed = await scene.beside("claim", scene.node.inbox.claim(scene.session.ownership))
    assert [item.key for item in claimed] == [message.key]


async def test_accept_beside_its_own_first_try(scene: Scene) -> None:
    message = request(scene.session, "2")
    accepted = await scene.beside("accept", scene.node.inbox.accept([message]))
    assert (accepted.stream, accepted.joined) == (message.stream, False)
    counts = await row_counts(scene.eyes)
    assert (counts["requests"], counts["streams"]) == (2, 3)


async def test_a_claim_whose_caller_gave_up_is_found_by_the_next_one(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patience ended with the reply lost: what was claimed must not lie there for ever."""
    async with store(database) as node, store(database) as edge:
        session = await opened(node)
        message = request(session)
        await edge.inbox.accept([message])
        put = GroupCommit.put

        async def unheard(*args: Any, **kwargs: Any) -> None:
            await put(*args, **kwargs)
            raise DatabaseUnavailable("the reply was lost")

        with monkeypatch.context() as patched:
            patched.setattr(GroupCommit, "put", unheard)
            assert isinstance(await outcome(node.inbox.claim(session.ownership)), DatabaseUnavailable)
        assert session.ownership in await node.inbox.unclaimed()
        assert [item.key for item in await node.inbox.claim(session.ownership)] == [message.key]


async def test_a_claim_that_is_found_later_brings_nothing_that_was_answered_meanwhile(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner works on the request already, under a claim that a crash of PostgreSQL has forgotten."""
    async with store(database) as node:
        session = await opened(node)
        note = request(session, None)
        await node.inbox.accept([request(session)])
        (claimed,) = await node.inbox.claim(session.ownership)
        eyes = await asyncpg.connect(database)
        claim = await eyes.fetchval("select claim from pgmcp.requests")
        await eyes.close()
        await node.inbox.put_back(session.ownership, {claimed.key: claim})
        await node.inbox.accept([note])
        put = GroupCommit.put

        async def unheard(*args: Any, **kwargs: Any) -> None:
            await put(*args, **kwargs)
            raise DatabaseUnavailable("the reply was lost")

        with monkeypatch.context() as patched:
            patched.setattr(GroupCommit, "put", unheard)
            assert isinstance(await outcome(node.inbox.claim(session.ownership)), DatabaseUnavailable)
        await node.log.append(answer(claimed))
        assert [item.key for item in await node.inbox.claim(session.ownership)] == [note.key]
