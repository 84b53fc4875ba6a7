"""The inbox: accepted messages are joined, claimed and ended as the port says, also by two nodes at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import asyncpg
import pytest

from pgmcp.errors import DatabaseUnavailable, DuplicateRequest, Fenced, PgmcpError
from pgmcp.store.group_commit import GroupCommit
from pgmcp.types import ANONYMOUS, Claimed, Message, Ownership, Principal, SessionKey, StreamId
from tests.harness.stores import (
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
    take_over,
)
from tests.harness.waiting import eventually

ME = Principal("client", "https://issuer", "me")


@dataclass
class Pair:
    """Two nodes, a session of the first, and a connection of the test's."""

    one: Store
    two: Store
    session: Session
    hand: asyncpg.Connection


@pytest.fixture
async def pair(database: str) -> AsyncIterator[Pair]:
    hand = await asyncpg.connect(database, timeout=10)
    try:
        async with store(database) as one, store(database) as two:
            yield Pair(one, two, await opened(one), hand)
    finally:
        await hand.close()


async def test_a_message_that_commits_late_is_claimed_all_the_same(pair: Pair) -> None:
    """Never an id cursor: the lower position becomes visible after the higher one was taken."""
    late = pair.hand.transaction()
    await late.start()
    await pair.hand.execute(
        "insert into pgmcp.requests (id, session, rpc_id, body, context, open) "
        f"values (gen_random_uuid(), {pair.session.key}, '\"late\"', '', '', true)"
    )
    await pair.two.inbox.accept([request(pair.session, "2")])
    assert [item.rpc_id for item in await pair.one.inbox.claim(pair.session.ownership)] == ["2"]
    await late.commit()
    assert [item.rpc_id for item in await pair.one.inbox.claim(pair.session.ownership)] == ['"late"']


async def held_accept(pair: Pair, messages: list[Message], rival: Message) -> object:
    """Accept messages at the second node while another edge is committing ``rival``."""
    looking = await asyncpg.connect(pair.one.database.settings.database_url, timeout=10)
    eyes = Watcher(looking)
    try:
        async with pair.hand.transaction():
            await pair.hand.execute(
                "insert into pgmcp.streams (id, session, kind, unfinished) values ($1, $2, 'request', 1)",
                rival.stream,
                pair.session.key,
            )
            await pair.hand.execute(
                "insert into pgmcp.requests (id, session, rpc_id, body, context, stream, open) "
                "values ($1, $2, $3, $4, '', $5, true)",
                rival.key,
                pair.session.key,
                rival.rpc_id,
                rival.body,
                rival.stream,
            )
            call = asyncio.create_task(outcome(pair.two.inbox.accept(messages)))
            await eyes.until_waiting("accept", call)
        return await call
    finally:
        await looking.close()


async def test_an_accept_that_loses_against_another_edge_leaves_no_stream(pair: Pair) -> None:
    rival = request(pair.session)
    accepted = await held_accept(pair, [request(pair.session)], rival)
    assert getattr(accepted, "stream", accepted) == rival.stream
    assert (await row_counts(pair.hand))["streams"] == 2


async def test_a_batch_that_loses_one_message_stores_none(pair: Pair) -> None:
    stream = StreamId(IDS.uuid())
    batch = [request(pair.session, "1", stream=stream), request(pair.session, "2", stream=stream)]
    rival = request(pair.session, "2")
    assert isinstance(await held_accept(pair, batch, rival), DuplicateRequest)
    assert [item.key for item in await pair.one.inbox.claim(pair.session.ownership)] == [rival.key]


async def test_opposite_orders_do_not_deadlock(pair: Pair) -> None:
    """Two edges insert the same retried requests in opposite order."""
    for turn in range(4):
        messages = [request(pair.session, str(turn * 100 + number)) for number in range(20)]
        calls = [
            node.inbox.accept([replace(message, key=request("").key, stream=StreamId(IDS.uuid()))])
            for node, order in ((pair.one, messages), (pair.two, messages[::-1]))
            for message in order
        ]
        await asyncio.gather(*calls)
    assert await deadlocks(pair) == 0
    assert (await row_counts(pair.hand))["requests"] == 80


async def deadlocks(pair: Pair) -> int:
    """How many deadlocks PostgreSQL has resolved in this database; its counters come when connections end."""
    await pair.one.database.close()
    await pair.two.database.close()

    async def alone() -> bool:
        others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        return bool(await pair.hand.fetchval(others) == 0)

    await eventually(alone, "connections end")
    count: int = await pair.hand.fetchval("select deadlocks from pg_stat_database where datname = current_database()")
    return count


class Hammer:
    """Two nodes accept for, claim in, append to, take over and end the same sessions."""

    CALLS, TAKEOVERS = 40, 12

    def __init__(self, pair: Pair, sessions: list[Session]) -> None:
        self.pair, self.sessions = pair, sessions
        self.owners: dict[SessionKey, tuple[Store, Ownership]] = {
            session.key: (pair.one, session.ownership) for session in sessions
        }
        self.claims: list[Claimed] = []
        self.accepted: set[object] = set()
        self.stored: list[tuple[StreamId, int, int]] = []
        self.calling = len(sessions)

    async def client(self, session: Session, place: int) -> None:
        """POST calls and notifications, at each node in turn."""
        for number in range(self.CALLS):
            node = (self.pair.one, self.pair.two)[(number + place) % 2]
            message = request(session, str(number) if number % 4 else None)
            await node.inbox.accept([message])
            self.accepted.add(message.key)
        self.calling -= 1

    async def owner(self, node: Store, session: Session) -> None:
        """Claim and answer as long as somebody calls, by the ownership that this node believes in."""
        believed: Ownership | None = None
        while True:
            last = self.calling == 0
            await asyncio.sleep(0)
            holder, ownership = self.owners[session.key]
            if holder is node:
                believed = ownership
            if believed is not None:
                await self.work(node, believed)  # also when it is another's by now: that must be refused
            if last:
                return

    async def work(self, node: Store, believed: Ownership) -> None:
        claimed = await outcome(node.inbox.claim(believed))
        if isinstance(claimed, PgmcpError):
            assert isinstance(claimed, Fenced)
            return
        self.claims += claimed
        await asyncio.gather(*(self.run(node, item) for item in claimed if item.stream is not None))

    async def run(self, node: Store, item: Claimed) -> None:
        note = replace(answer(item, message=b"progress"), finishes=None, outcome=None)
        for entry in (note, answer(item, item.next_seq + 1)):
            result = await outcome(node.log.append(entry))
            if isinstance(result, PgmcpError):
                assert isinstance(result, Fenced)
                return
            self.stored.append((entry.stream, entry.seq, item.ownership.epoch))

    async def taker(self) -> None:
        """Take sessions over, to and fro."""
        for turn in range(self.TAKEOVERS):
            session = self.sessions[turn % len(self.sessions)]
            node = self.pair.two if self.owners[session.key][0] is self.pair.one else self.pair.one
            async with self.pair.hand.transaction():
                await take_over(self.pair.hand, session.key, node.node)
                epoch = await self.pair.hand.fetchval("select epoch from pgmcp.sessions where id = $1", session.key)
            self.owners[session.key] = (node, Ownership(session.key, epoch))
            await asyncio.sleep(0)

    async def run_all(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.taker())
            for place, session in enumerate(self.sessions):
                tasks.create_task(self.client(session, place))
                for node in (self.pair.one, self.pair.two):
                    tasks.create_task(self.owner(node, session))


async def test_two_nodes_hammer_the_same_sessions(pair: Pair) -> None:
    hammer = Hammer(pair, [await opened(pair.one) for _ in range(4)])
    async with asyncio.timeout(60):
        await hammer.run_all()
    keys = [item.key for item in hammer.claims]
    assert len(keys) == len(set(keys)), "a request was claimed twice"
    assert set(keys) == hammer.accepted, "a request was accepted, and claimed by nobody"
    epochs = {row["id"]: row["claimed_epoch"] for row in await pair.hand.fetch("select * from pgmcp.requests")}
    assert all(epochs[item.key] == item.ownership.epoch for item in hammer.claims)
    assert await pair.hand.fetchval("select max(runs) from pgmcp.requests") == 1
    await check_streams(pair.hand)
    rows = await pair.hand.fetch("select stream, seq from pgmcp.events")
    assert sorted((row["stream"], row["seq"]) for row in rows) == sorted(
        (stream, seq) for stream, seq, _ in hammer.stored
    )
    assert await deadlocks(pair) == 0


async def test_a_claim_that_gave_up_is_forgotten_with_its_session(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session has ended meanwhile: nothing waits for anybody any more."""

    async def gives_up(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("not in time")

    with monkeypatch.context() as patched:
        patched.setattr(GroupCommit, "put", gives_up)
        assert isinstance(await outcome(pair.one.inbox.claim(pair.session.ownership)), DatabaseUnavailable)
    assert pair.session.ownership in await pair.one.inbox.unclaimed()
    await pair.two.inbox.end(pair.session.session_id, ANONYMOUS)
    assert await pair.one.inbox.unclaimed() == []
