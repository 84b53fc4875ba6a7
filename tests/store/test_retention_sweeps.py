"""Retention: small batches on every node at once, in nobody's way, with a breaker for each duty."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

import asyncpg
import pytest

from pgmcp.store import retention
from pgmcp.store.retention import BOTTOM_SECONDS, OVERLAP_SECONDS, REVISIT, Breaker, Retention
from pgmcp.types import NodeId
from tests.harness.stores import IDS, Session, Store, Watcher, opened, store

RETENTION = 60.0
OLD_STREAMS = """
insert into pgmcp.streams (id, session, kind, closed, closed_at)
select gen_random_uuid(), $1, 'request', true, now() - interval '1 hour' from generate_series(1, $2)
"""
OLD_MESSAGES = """
insert into pgmcp.requests (id, session, body, context, open, finished_at, claimed_epoch)
select gen_random_uuid(), $1, '', '', false, now() - interval '1 hour', 1 from generate_series(1, $2)
"""
SLOW = """
create function pgmcp.slow() returns trigger language plpgsql as $$ begin perform pg_sleep({}); return old; end $$;
create trigger slow before delete on pgmcp.streams for each row execute function pgmcp.slow()
"""
BROKEN = """
create function pgmcp.broken() returns trigger language plpgsql as $$ begin raise 'it is broken'; end $$;
create trigger broken before delete on pgmcp.streams for each row execute function pgmcp.broken()
"""
STREAMS = "select count(*) from pgmcp.streams where kind = 'request'"
MESSAGES = "select count(*) from pgmcp.requests"


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    made = await asyncpg.connect(database, timeout=10)
    yield made
    await made.close()


@pytest.fixture
async def node(database: str) -> AsyncIterator[Store]:
    async with store(database, retention=RETENTION) as made:
        yield made


@pytest.fixture
async def session(node: Store) -> Session:
    return await opened(node)


def test_a_breaker_takes_smaller_batches_then_pauses_and_recovers() -> None:
    breaker = Breaker(500)
    assert [breaker.failed(0.0) for _ in range(5)] == [None, None, 60.0, None, None]
    assert breaker.size == 15
    assert not breaker.closed(239.9)
    assert breaker.closed(240.0)
    for _ in range(20):
        breaker.failed(0.0)
    assert breaker.size == 1
    assert not breaker.closed(retention.LONGEST_PAUSE_SECONDS - 0.1)
    assert breaker.closed(retention.LONGEST_PAUSE_SECONDS)
    assert [breaker.succeeded() for _ in range(3)] == [True, False, False]
    for _ in range(20 * 9):
        breaker.succeeded()
    assert breaker.size == 500
    assert breaker.failed(0.0) is None, "the failures before are forgotten"


def test_nodes_do_not_sweep_in_step() -> None:
    pauses = {IDS.jitter(retention.EVERY_SECONDS) for _ in range(100)}
    assert len(pauses) > 50
    assert all(retention.EVERY_SECONDS / 2 <= pause <= retention.EVERY_SECONDS for pause in pauses)


async def test_sweeps_of_many_nodes_take_each_their_share_and_wait_for_nobody(
    database: str, hand: asyncpg.Connection, node: Store, session: Session
) -> None:
    await hand.execute(OLD_STREAMS, session.key, 3000)
    await hand.execute(OLD_MESSAGES, session.key, 3000)
    busy, eyes = [await asyncpg.connect(database, timeout=10) for _ in range(2)]
    async with busy.transaction():  # somebody works with a few of each
        await busy.execute("select from pgmcp.streams where kind = 'request' order by closed_at limit 10 for update")
        await busy.execute("select from pgmcp.requests order by finished_at limit 10 for update")
        waited = 0

        async def watch() -> None:
            nonlocal waited
            while True:
                waited += await Watcher(eyes).waiting("/* prune")
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        async with asyncio.timeout(30):
            await asyncio.gather(*(Retention(node.database, IDS).prune() for _ in range(4)))
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        assert waited == 0
        assert [await hand.fetchval(STREAMS), await hand.fetchval(MESSAGES)] == [10, 10]
    await Retention(node.database, IDS).prune()
    assert [await hand.fetchval(STREAMS), await hand.fetchval(MESSAGES)] == [0, 0]
    for connection in (busy, eyes):
        await connection.close()


async def test_a_duty_that_takes_too_long_goes_on_in_smaller_batches_and_stops_no_other(
    database: str, hand: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PAUSE_SECONDS", 0.0)
    async with store(database, retention=RETENTION, statement_timeout=1.0) as node:
        session = await opened(node)
        await hand.execute(OLD_STREAMS, session.key, 1000)
        await hand.execute(OLD_MESSAGES, session.key, 1000)
        await hand.execute(SLOW.format(0.004))
        sweeps = Retention(node.database, IDS)
        await sweeps.prune()
        assert await hand.fetchval(STREAMS) == 1000, "a batch of 500 takes two seconds"
        assert await hand.fetchval(MESSAGES) == 0
        for _ in range(10):
            await sweeps.prune()
            if not await hand.fetchval(STREAMS):
                break
        assert await hand.fetchval(STREAMS) == 0
        assert sweeps.breakers["prune_streams"].size < 500
        assert sweeps.breakers["prune_messages"].size == 500


async def test_a_duty_that_fails_again_and_again_pauses_says_so_once_and_recovers_by_itself(
    hand: asyncpg.Connection, node: Store, session: Session, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "pgmcp.store.retention")
    await hand.execute(OLD_STREAMS, session.key, 10)
    await hand.execute(BROKEN)
    asked: list[str] = []
    ask = node.database.ask

    async def noted(name: str, *args: object) -> list[asyncpg.Record]:
        asked.append(name)
        return await ask(name, *args)

    now = 1000.0
    monkeypatch.setattr(node.database, "ask", noted)
    monkeypatch.setattr(node.database.clock, "boottime", lambda: now)
    sweeps = Retention(node.database, IDS)
    for _ in range(6):
        await sweeps.prune()
    assert asked.count("prune_streams") == 3
    assert asked.count("prune_messages") == 6
    now += 61
    for _ in range(3):
        await sweeps.prune()
    assert asked.count("prune_streams") == 4
    [line] = caplog.messages
    assert line.startswith("prune_streams failed 3 times and pauses for 60 s or more: ")
    assert "RaiseError" in line
    await hand.execute("drop trigger broken on pgmcp.streams")
    await sweeps.prune()
    assert await hand.fetchval(STREAMS) == 10, "not before its time"
    now += 121
    await sweeps.prune()
    assert await hand.fetchval(STREAMS) == 0
    assert caplog.messages[1:] == ["prune_streams works again"]


async def test_a_sweep_begins_where_the_last_one_left_nothing(
    node: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What is gone is not walked again while a snapshot holds it; what others had locked is looked for now and then."""
    oldest: list[object] = []
    ask, now = node.database.ask, 1000.0

    async def noted(name: str, *args: object) -> list[asyncpg.Record]:
        if name == "prune_streams":
            oldest.append(args[1])
        return await ask(name, *args)

    monkeypatch.setattr(node.database, "ask", noted)
    monkeypatch.setattr(node.database.clock, "boottime", lambda: now)
    sweeps = Retention(node.database, IDS)
    for _ in range(REVISIT + 1):
        await sweeps.prune()
        now += 30
    retention = node.database.settings.retention
    assert oldest == [BOTTOM_SECONDS, *[30 + retention + OVERLAP_SECONDS] * (REVISIT - 1), BOTTOM_SECONDS]


async def test_a_sweep_ends_when_its_turn_is_over(
    hand: asyncpg.Connection, node: Store, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    await hand.execute(OLD_STREAMS, session.key, 2000)
    monkeypatch.setattr(retention, "TURN_SECONDS", 0.0)
    for left in (1500, 1000, 500, 0):
        await Retention(node.database, IDS).prune()
        assert await hand.fetchval(STREAMS) == left


async def test_what_an_attached_reader_has_not_got_stays(
    hand: asyncpg.Connection, node: Store, session: Session
) -> None:
    await hand.execute(OLD_STREAMS, session.key, 2)
    reader = NodeId(IDS.uuid())
    await hand.execute(
        "update pgmcp.streams set sink = $1, closed_at = now() - interval '5 minutes' "
        "where id = (select id from pgmcp.streams where kind = 'request' limit 1)",
        reader,
    )
    await hand.execute(
        "insert into pgmcp.events (stream, seq, message) select $1, n, '' from generate_series(1, 5) n",
        session.standalone,
    )
    await hand.execute(
        "update pgmcp.streams set sink = $2, next_seq = 6, delivered_seq = 3 where id = $1", session.standalone, reader
    )
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval("select count(*) from pgmcp.events") == 5, "they have only a mark"
    await hand.execute("update pgmcp.streams set marked_at = marked_at - interval '1 hour'")
    await Retention(node.database, IDS).prune()
    assert [row["sink"] for row in await hand.fetch("select sink from pgmcp.streams")] == [reader] * 2
    assert [row["seq"] for row in await hand.fetch("select seq from pgmcp.events order by seq")] == [4, 5]
    assert await hand.fetchval("select floor_seq from pgmcp.streams where id = $1", session.standalone) == 3
    await hand.execute("update pgmcp.streams set sink = null, delivered_seq = next_seq - 1")
    for _ in range(2):
        await Retention(node.database, IDS).prune()
        await hand.execute("update pgmcp.streams set marked_at = marked_at - interval '1 hour'")
    await Retention(node.database, IDS).prune()
    assert [await hand.fetchval(STREAMS), await hand.fetchval("select count(*) from pgmcp.events")] == [0, 0]


async def test_busy_standalone_streams_do_not_stand_before_others(hand: asyncpg.Connection, node: Store) -> None:
    """More of them than a batch: what they have delivered is too young, in every batch anew."""
    await hand.execute(
        """
        insert into pgmcp.sessions (session_id, owner, transport)
            select 's' || n, gen_random_uuid(), 'streamable' from generate_series(1, 700) n;
        insert into pgmcp.streams (id, session, kind, next_seq, delivered_seq, marked_seq, marked_at)
            select ('00000000-0000-0000-0000-' || lpad(id::text, 12, '0'))::uuid, id, 'standalone', 3, 2, 1,
                now() - case when id > (select max(id) - 100 from pgmcp.sessions)
                    then interval '1 hour' else interval '0' end
            from pgmcp.sessions;
        insert into pgmcp.events (stream, seq, message) select id, n, '' from pgmcp.streams, generate_series(1, 2) n;
        """
    )
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval("select count(*) from pgmcp.events") == 1300
    assert await hand.fetchval("select count(*) from pgmcp.streams where floor_seq = 1") == 100
    assert await hand.fetchval("select count(*) from pgmcp.streams where marked_seq = 2") == 100


async def test_marks_and_batches_come_to_an_end(hand: asyncpg.Connection, node: Store) -> None:
    """More streams and more events than a batch: each stream's events go once, below its floor, and so do its marks."""
    await hand.execute(
        """
        insert into pgmcp.sessions (session_id, owner, transport)
            select 's' || n, gen_random_uuid(), 'streamable' from generate_series(1, 600) n;
        insert into pgmcp.streams (id, session, kind, next_seq, delivered_seq)
            select gen_random_uuid(), id, 'standalone', 8, 7 from pgmcp.sessions;
        insert into pgmcp.events (stream, seq, message) select id, n, '' from pgmcp.streams, generate_series(1, 7) n;
        """
    )
    marks = "select count(*) from pgmcp.streams where marked_seq = 7 and marked_at is not null"
    await Retention(node.database, IDS).prune()
    assert [await hand.fetchval(marks), await hand.fetchval("select count(*) from pgmcp.events")] == [600, 4200]
    before = "select min(marked_at) from pgmcp.streams"
    first = await hand.fetchval(before)
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval(before) == first, "a mark stays until it is old"
    await hand.execute("update pgmcp.streams set marked_at = marked_at - interval '1 hour'")
    await Retention(node.database, IDS).prune()
    assert [await hand.fetchval(marks), await hand.fetchval("select count(*) from pgmcp.events")] == [0, 0]
    assert await hand.fetchval("select count(*) from pgmcp.streams where floor_seq = 7") == 600
    assert await node.database.ask("prune_standalone", RETENTION, 500) == [], "what has no events is left alone"


async def test_a_batch_that_ends_within_a_stream_leaves_its_rest(hand: asyncpg.Connection, node: Store) -> None:
    session = await opened(node)
    await hand.execute(
        "insert into pgmcp.events (stream, seq, message) select $1, n, '' from generate_series(1, 25) n",
        session.standalone,
    )
    await hand.execute("update pgmcp.streams set next_seq = 26, delivered_seq = 24")
    assert len(await node.database.ask("prune_standalone", RETENTION, 10)) == 1
    await hand.execute("update pgmcp.streams set delivered_seq = 25, marked_at = marked_at - interval '1 hour'")
    for floor, mark in ((10, 24), (20, 24), (24, 25)):
        await node.database.ask("prune_standalone", RETENTION, 10)
        [row] = await hand.fetch("select floor_seq, marked_seq from pgmcp.streams where kind = 'standalone'")
        assert tuple(row) == (floor, mark)
    assert [row["seq"] for row in await hand.fetch("select seq from pgmcp.events")] == [25]


async def test_what_a_dead_node_carried_can_be_had_elsewhere_for_the_whole_retention(
    hand: asyncpg.Connection, node: Store, session: Session
) -> None:
    """A client read slowly, or came late; then its node died."""
    await hand.execute(OLD_STREAMS, session.key, 1)
    await hand.execute(
        "insert into pgmcp.nodes (node_id, name, address, state, expires_at, version, schema_revision) "
        "values (gen_random_uuid(), 'n', '', 'dead', now(), '', '')"
    )
    await hand.execute(
        "update pgmcp.streams set sink = (select node_id from pgmcp.nodes where state = 'dead'), "
        "closed_at = now() - interval '5 minutes' where kind = 'request'"
    )
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval(STREAMS) == 1
    assert await hand.fetchval("select count(*) from pgmcp.streams where sink is not null") == 0
    await hand.execute("update pgmcp.streams set released_at = released_at - interval '61 seconds'")
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval(STREAMS) == 0


async def test_a_long_stream_goes_piece_by_piece_below_its_floor(
    hand: asyncpg.Connection, node: Store, session: Session
) -> None:
    await hand.execute(OLD_STREAMS, session.key, 1)
    await hand.execute("update pgmcp.streams set next_seq = 1201 where kind = 'request'")
    await hand.execute(
        "insert into pgmcp.events (stream, seq, message) select id, n, '' from pgmcp.streams, "
        "generate_series(1, 1200) n where kind = 'request'"
    )
    state = (
        "select floor_seq, (select count(*) from pgmcp.events), (select min(seq) from pgmcp.events) from pgmcp.streams"
    )
    for wanted in ((500, 700, 501), (1000, 200, 1001), (1200, 0, None)):
        assert await node.database.ask("prune_streams", RETENTION, BOTTOM_SECONDS, 500) == []
        assert len(await node.database.ask("prune_long_streams", RETENTION, BOTTOM_SECONDS, 500)) == min(
            500, wanted[0] % 1000 or 500
        )
        [row] = await hand.fetch(f"{state} where kind = 'request'")
        assert tuple(row) == wanted
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval(STREAMS) == 0


async def test_the_history_of_takeovers_is_bounded_in_time_and_rows(hand: asyncpg.Connection, node: Store) -> None:
    insert = (
        "insert into pgmcp.takeovers (session, session_id, from_node, to_node, epoch, reason, at) "
        "select 1, 's', gen_random_uuid(), gen_random_uuid(), 1, 'lease', now() - $1 * interval '1 day' "
        "from generate_series(1, $2)"
    )
    count = "select count(*) from pgmcp.takeovers"
    await hand.execute(insert, 8, 700)
    await hand.execute(insert, 6, 10)
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval(count) == 10
    await hand.execute(insert, 0, 100_000)
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval(count) == 100_000
    assert await hand.fetchval("select min(at) > now() - interval '1 hour' from pgmcp.takeovers")


async def test_expired_sessions_go_however_many_they_are(hand: asyncpg.Connection, node: Store) -> None:
    await hand.execute(
        "insert into pgmcp.sessions (session_id, owner, transport, created_at) "
        "select 'old' || n, gen_random_uuid(), 'streamable', now() - interval '30 days' from generate_series(1, 250) n"
    )
    assert len(set(await Retention(node.database, IDS).expire())) == 250
    assert await hand.fetchval("select count(*) from pgmcp.sessions") == 0
