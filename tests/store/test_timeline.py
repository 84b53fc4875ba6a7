"""Another timeline of the database begins a term: once, and before anything is done in it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, Fenced, OutOfStep, PgmcpError
from pgmcp.session.event_appender import EventAppender
from pgmcp.session.fenced_writer import FencedWriter
from pgmcp.session.outbox import Outbox
from pgmcp.session.running_requests import Stream
from pgmcp.settings import Settings
from pgmcp.store import timeline
from pgmcp.store.database import Database
from pgmcp.store.statements import statement
from pgmcp.types import JUMP, Entry, Ownership
from tests.harness.stores import (
    BACKENDS,
    ELSEWHERE,
    IDS,
    Store,
    answer,
    opened,
    outcome,
    promote,
    request,
    store,
)

MANY = 10_000
"""Sessions, which one statement does not move within the deadline of the test."""


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database, timeout=10)
    yield connection
    await connection.close()


async def row(hand: asyncpg.Connection) -> asyncpg.Record:
    found = await hand.fetchrow("select * from pgmcp.history")
    assert found is not None
    return found


async def arrived(node: Store, term: int) -> None:
    """The node has noticed."""
    await node.database.persist("ready_nodes", node.node, patience=10)
    assert node.database.timeline.term == term


async def test_the_first_node_notes_the_history_and_nothing_jumps(database: str, hand: asyncpg.Connection) -> None:
    assert (await row(hand))["mark"] == ""
    async with store(database) as node:
        session = await opened(node)
        found = await row(hand)
        system = await hand.fetchval("select system_identifier::text from pg_control_system()")
        assert (found["term"], found["mark"]) == (0, f"{system}/00000001")
        assert (session.ownership.epoch, node.database.timeline.term) == (1, 0)
    async with store(database) as node:
        assert (await row(hand))["id"] == found["id"] == node.database.timeline.known


async def test_all_numbers_jump_once_however_many_nodes_come_at_once(database: str, hand: asyncpg.Connection) -> None:
    async with store(database) as first:
        session = await opened(first)
        await first.inbox.accept([request(session, "1"), request(session, "2")])
        done, running = await first.inbox.claim(session.ownership)
        await first.log.append(answer(done))
        changes: list[None] = []
        first.database.timeline.on_change = lambda: changes.append(None)
        await promote(hand)
        async with AsyncExitStack() as stack:
            nodes = await asyncio.gather(*(stack.enter_async_context(store(database)) for _ in range(5)))
            await arrived(first, 1)
            assert {node.database.timeline.term for node in nodes} == {1}
        assert len(changes) == 1
        assert (await row(hand))["term"] == 1
        assert await hand.fetchval("select epoch from pgmcp.sessions") == 1 + JUMP
        assert done.stream is not None
        assert running.stream is not None
        stands = await first.log.stands([done.stream, running.stream, session.standalone])
        assert {stream: stand.next_seq for stream, stand in stands.items()} == {
            done.stream: 2,
            running.stream: 1 + JUMP,
            session.standalone: 1 + JUMP,
        }
        assert (await opened(first)).ownership.epoch == 1 + JUMP


async def test_a_term_begins_in_pieces_and_whoever_comes_goes_on(
    database: str, hand: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a deadline nor a crash in the middle undoes or repeats what was moved."""
    async with store(database) as node:
        for _ in range(7):
            await opened(node)
        monkeypatch.setattr(timeline, "PIECE", 2)
        fetchval, pieces = asyncpg.Connection.fetchval, list[int]()

        async def broken(connection: asyncpg.Connection, query: str, *args: Any, **options: Any) -> Any:
            found = await fetchval(connection, query, *args, **options)
            if query.startswith("/* move_to_term */"):
                pieces.append(found)
                if len(pieces) == 2:
                    connection.terminate()  # as its deadline does
            return found

        monkeypatch.setattr(asyncpg.Connection, "fetchval", broken)
        await promote(hand)
        with pytest.raises(DatabaseUnavailable):
            async with store(database):
                pass
        found = await row(hand)
        assert (found["term"], found["mark"], found["next_term"]) == (0, ELSEWHERE, 1)
        moved = await hand.fetchval("select count(*) from pgmcp.sessions where epoch = $1", 1 + JUMP)
        assert moved == 4
        async with store(database):
            await arrived(node, 1)
        assert pieces == [2, 2, 2, 1]
        assert {each["epoch"] for each in await hand.fetch("select epoch from pgmcp.sessions")} == {1 + JUMP}
        assert {each["next_seq"] for each in await hand.fetch("select next_seq from pgmcp.streams")} == {1 + JUMP}
        assert (await row(hand))["next_id"] is None


async def test_another_failover_while_a_term_begins(
    database: str, hand: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had moved moves on; an owner's numbers are those of the newest term."""
    async with store(database) as node:
        for _ in range(5):
            await opened(node)
        await promote(hand)
        elsewhere = "7000000000000000000/00000002"
        text = statement("announce_term", "pgmcp")
        await hand.fetch(text, (await row(hand))["id"], IDS.uuid(), 1, elsewhere)
        await hand.fetch(statement("move_to_term", "pgmcp"), (await row(hand))["next_id"], 3)
        await arrived(node, 2)
        epochs = [each["epoch"] for each in await hand.fetch("select epoch from pgmcp.sessions")]
        assert epochs == [1 + 2 * JUMP] * 5


async def test_a_term_begins_within_short_deadlines_however_many_sessions_there_are(
    database: str, hand: asyncpg.Connection
) -> None:
    await hand.execute(
        f"""
        insert into pgmcp.sessions (session_id, owner, transport)
            select 's' || n, gen_random_uuid(), 'streamable' from generate_series(1, {MANY}) n;
        insert into pgmcp.streams (id, session, kind) select gen_random_uuid(), id, 'standalone' from pgmcp.sessions;
        """
    )
    async with store(database, statement_timeout=0.75) as node:
        await promote(hand)
        await node.database.persist("ready_nodes", node.node, patience=60)
        assert node.database.timeline.term == 1
    assert await hand.fetchval("select count(*) from pgmcp.sessions where epoch = $1", 1 + JUMP) == MANY


async def test_nothing_of_the_former_era_is_written(database: str, hand: asyncpg.Connection) -> None:
    async with store(database) as node:
        session = await opened(node)
        await node.inbox.accept([request(session)])
        [claimed] = await node.inbox.claim(session.ownership)
        await promote(hand)
        await arrived(node, 1)
        assert isinstance(await outcome(node.log.append(answer(claimed))), Fenced)
        assert isinstance(await outcome(node.inbox.claim(session.ownership)), Fenced)
        now = Ownership(session.key, session.ownership.epoch + JUMP)
        await node.inbox.keep_claims([now], [claimed.key])
        assert isinstance(await outcome(node.log.append(answer(replace(claimed, ownership=now)))), OutOfStep), (
            "its number"
        )
        await node.log.append(answer(replace(claimed, ownership=now), seq=1 + JUMP))
        assert await hand.fetchval("select array_agg(seq) from pgmcp.events") == [1 + JUMP]


async def test_what_an_owner_does_not_work_on_waits_again(database: str, hand: asyncpg.Connection) -> None:
    async with store(database) as node:
        session = await opened(node)
        await node.inbox.accept([request(session, "1"), request(session, "2")])
        kept, other = await node.inbox.claim(session.ownership)
        await promote(hand)
        await arrived(node, 1)
        now = Ownership(session.key, session.ownership.epoch + JUMP)
        assert await node.inbox.unfinished([session.key]) == {session.key: {kept.key, other.key}}
        await node.inbox.keep_claims([now], [kept.key])
        assert [claimed.key for claimed in await node.inbox.claim(now)] == [other.key]
        assert {row["runs"] for row in await hand.fetch("select runs from pgmcp.requests")} == {1}


async def test_what_waits_when_an_era_begins_may_have_run(database: str, hand: asyncpg.Connection) -> None:
    """Its claim may be among what was lost: claims commit asynchronously."""
    async with store(database) as node:
        session = await opened(node)
        before, after = request(session, "1"), request(session, "2")
        await node.inbox.accept([before])
        await promote(hand)
        await arrived(node, 1)
        await node.inbox.accept([after])
        left = await node.takeovers.inherit(Ownership(session.key, session.ownership.epoch + JUMP))
        assert [request.key for request in left.requests] == [before.key]


async def test_waiting_notifications_outlive_the_jump(database: str, hand: asyncpg.Connection) -> None:
    async with store(database, max_waiting_events=3) as node:
        session = await opened(node)

        async def tell(epoch: int, seq: int) -> None:
            entry = Entry(Ownership(session.key, epoch), session.standalone, seq, b"{}", topic=f"topic {seq}")
            await node.log.append(entry)

        for seq in range(1, 6):
            await tell(1, seq)
        await promote(hand)
        await arrived(node, 1)
        await tell(1 + JUMP, 6 + JUMP)
        waiting = await hand.fetch("select seq from pgmcp.events order by seq")
        assert [each["seq"] for each in waiting] == [3, 4, 5, 6 + JUMP]
        lag = await hand.fetchval("select lag from pgmcp.live_streams where kind = 'standalone'")
        assert lag == 4


async def test_a_statement_that_was_begun_before_is_not_sent_after(database: str, hand: asyncpg.Connection) -> None:
    """It waits for a connection while the node finds the new timeline."""
    async with store(database) as node:
        await promote(hand)
        while node.database.timeline.term == 0:
            assert isinstance(await outcome(node.database.ask("ready_nodes", node.node)), DatabaseUnavailable)


async def test_a_history_that_forked_is_another_one_though_it_counts_alike(
    database: str, hand: asyncpg.Connection
) -> None:
    async with store(database) as node:
        session = await opened(node)
        await hand.execute("update pgmcp.history set id = gen_random_uuid()")
        await hand.execute(f"select pg_terminate_backend(pid) {BACKENDS}")
        await arrived(node, 1)
        assert await hand.fetchval("select epoch from pgmcp.sessions where id = $1", session.key) == 1 + JUMP


async def test_a_node_that_knows_more_eras_counts_on(database: str, hand: asyncpg.Connection) -> None:
    async with store(database) as node:
        await opened(node)
    was = await row(hand)
    await hand.execute("update pgmcp.history set id = $1, term = 4", IDS.uuid())
    async with store(database) as node:
        await arrived(node, 4)
        await hand.execute("update pgmcp.history set id = $1, term = $2", was["id"], was["term"])
        await hand.execute(f"select pg_terminate_backend(pid) {BACKENDS}")
        await arrived(node, 5)
        assert await hand.fetchval("select epoch from pgmcp.sessions") == 1 + 5 * JUMP


class Promoted:
    """A connection to the server as it was promoted, in a timeline of PostgreSQL's own that is newer."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def fetchrow(self, query: str, *args: object) -> dict[str, Any]:
        found = await self.connection.fetchrow(query, *args)
        assert found is not None
        newer = {name: found[name].replace("/00000001", "/00000002") for name in ("mark", "present")}
        return {**found, **newer}


async def test_a_server_that_was_left_behind_is_refused(database: str) -> None:
    async with store(database) as node:
        async with AsyncExitStack() as stack:
            promoted: Any = Promoted(await asyncpg.connect(database, timeout=10))
            stack.push_async_callback(promoted.connection.close)
            await node.database.timeline.follow(promoted)
        with pytest.raises(ConnectionError, match="timeline that is over"):
            await node.database.connect(database, timeout=5)


async def test_an_ordinary_role_is_enough(database: str, hand: asyncpg.Connection) -> None:
    name = urlsplit(database).path.strip("/")
    await hand.execute(
        f"""
        create role {name} login password 'ordinary';
        grant usage on schema pgmcp to {name};
        grant select, insert, update, delete on all tables in schema pgmcp to {name};
        """
    )
    at = urlsplit(database)
    address = at._replace(netloc=f"{name}:ordinary@{at.hostname}:{at.port}").geturl()
    try:
        async with store(address) as node:
            await opened(node)
            await promote(hand)
            await arrived(node, 1)
            assert await hand.fetchval("select epoch from pgmcp.sessions") == 1 + JUMP
    finally:
        await hand.execute(f"drop owned by {name}; drop role {name}")


async def test_a_role_that_may_not_look_works_without(
    database: str, hand: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has revoked what everybody may by default."""
    name = urlsplit(database).path.strip("/")
    await hand.execute(
        f"""
        create role {name} login password 'ordinary';
        grant usage on schema pgmcp to {name};
        grant select, insert, update, delete on all tables in schema pgmcp to {name};
        revoke execute on function pg_control_system() from public;
        """
    )
    at = urlsplit(database)
    address = at._replace(netloc=f"{name}:ordinary@{at.hostname}:{at.port}").geturl()
    try:
        pool = Database(Settings(database_url=address), Clock())
        await pool.open()
        assert await pool.fetch("ready_nodes", IDS.uuid()) == []
        await pool.close()
        assert caplog.text.count("will not be noticed") == 1
    finally:
        await hand.execute(f"drop owned by {name}; drop role {name}")


async def test_a_session_that_has_jumped_twice_jumps_with_the_next_term_too(
    database: str, hand: asyncpg.Connection
) -> None:
    """An older build begins a term in one statement, also where a newer one has moved some of the sessions."""
    async with store(database) as node:
        session = await opened(node)
        await hand.execute("update pgmcp.sessions set epoch = epoch + 2 * $1", JUMP)
        await hand.execute("update pgmcp.history set term = 1")
        await promote(hand)
        await arrived(node, 3)
        assert await node.inbox.owned() == {Ownership(session.key, session.ownership.epoch + 3 * JUMP)}


async def test_what_is_said_in_a_new_term_waits_for_what_was_said_before_it(
    database: str, hand: asyncpg.Connection
) -> None:
    """What was being stored gets its new number first; a session lost step with the tables, and its calls."""
    gate, refused = asyncio.Event(), list[PgmcpError]()

    async def settled() -> None:
        await gate.wait()

    async with store(database, gate=settled) as node:
        session = await opened(node)
        writer = FencedWriter(session.ownership, Clock(), lambda: not refused)
        outbox = Outbox(Stream(session.standalone, 1))
        appender = EventAppender(outbox, writer, node.log, lambda *_: None, refused.append)
        for text in (b"1", b"2"):
            appender.store(outbox.standalone, text)
        await asyncio.sleep(0)  # they wait for the primary
        await promote(hand)
        await arrived(node, 1)
        outbox.go_on(await node.log.stands(list(outbox.known())), JUMP)
        writer.ownership = Ownership(session.key, session.ownership.epoch + JUMP)
        appender.store(outbox.standalone, b"3")
        await asyncio.sleep(0)
        gate.set()
        async with asyncio.timeout(10):
            await appender.settled()
        assert refused == []
        rows = await hand.fetch("select seq, message from pgmcp.events order by seq")
        assert [tuple(each) for each in rows] == [(JUMP + seq, str(seq).encode()) for seq in (1, 2, 3)]


async def test_after_a_restore_from_a_dump_a_term_begins_by_the_line_of_the_runbook(
    database: str, hand: asyncpg.Connection
) -> None:
    """A dump has the timeline of the server that it is restored into: without that line nobody could tell."""
    runbook = (Path(__file__).parents[2] / "docs" / "backup.md").read_text()
    [line] = re.findall(r'--command "(update pgmcp\.history [^"]+)"', runbook)
    async with store(database) as before:
        session = await opened(before)
        await before.inbox.accept([request(session, "1")])
        [claimed] = await before.inbox.claim(session.ownership)
    await hand.execute(line)
    async with store(database) as node:
        assert node.database.timeline.term == 1
        assert (await row(hand))["mark"] != "restored"
        assert await hand.fetchval("select epoch from pgmcp.sessions") == 1 + JUMP
        assert claimed.stream is not None
        assert (await node.log.stands([claimed.stream]))[claimed.stream].next_seq == 1 + JUMP
    await hand.execute(line)
    await hand.execute("update pgmcp.history set mark = ''")
    await hand.execute(line)
    assert (await row(hand))["mark"] == "", "nothing of a schema that no node has seen"
