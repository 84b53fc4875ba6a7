"""Looks from a floor pass over nothing, in whatever order transactions commit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from pgmcp.errors import SessionBusy
from pgmcp.store.scan_floors import BOTTOM, RUNNING, ScanFloor, ScanFloors
from tests.harness.stores import IDS, Session, opened, outcome, request, store


@pytest.fixture
async def late(database: str) -> AsyncIterator[asyncpg.Connection]:
    """An edge whose accept takes long to commit."""
    connection = await asyncpg.connect(database, timeout=10)
    yield connection
    await connection.close()


async def accept_without_commit(late: asyncpg.Connection, session: Session, rpc_id: str) -> UUID:
    await late.execute("begin")
    key = IDS.uuid()
    await late.execute(
        "insert into pgmcp.requests (id, session, rpc_id, method, body, context, open) "
        "values ($1, $2, $3, 'tools/call', '', '', true)",
        key,
        session.key,
        rpc_id,
    )
    return key


async def test_a_claim_finds_what_was_begun_before_and_committed_after(database: str, late: asyncpg.Connection) -> None:
    async with store(database) as owner:
        session = await opened(owner)
        first = await accept_without_commit(late, session, "first")
        for number in range(3):
            await owner.inbox.accept([request(session, str(number))])
            assert len(await owner.inbox.claim(session.ownership)) == 1
        await late.execute("commit")
        await owner.inbox.accept([request(session, "last")])
        claimed = await owner.inbox.claim(session.ownership)
        assert [each.rpc_id for each in claimed] == ["first", "last"], "in the order of their positions"
        assert claimed[0].key == first
        assert await owner.inbox.claim(session.ownership) == []


async def test_a_poll_finds_what_was_begun_before_and_committed_after(database: str, late: asyncpg.Connection) -> None:
    async with store(database) as owner:
        session = await opened(owner)
        await accept_without_commit(late, session, "first")
        for number in range(3):
            await owner.inbox.accept([request(session, str(number))])
            await owner.inbox.claim(session.ownership)
            assert await owner.inbox.unclaimed() == []
        await late.execute("commit")
        assert await owner.inbox.unclaimed() == [session.ownership]
        assert await owner.inbox.unclaimed() == [session.ownership], "until it is claimed"
        assert [each.rpc_id for each in await owner.inbox.claim(session.ownership)] == ["first"]
        assert await owner.inbox.unclaimed() == []


async def test_what_committed_late_counts(database: str, late: asyncpg.Connection) -> None:
    async with store(database, max_in_flight=3) as edge:
        session = await opened(edge)
        await accept_without_commit(late, session, "first")
        await edge.inbox.accept([request(session, "1")])
        await edge.inbox.accept([request(session, "2")])
        await late.execute("commit")
        assert isinstance(await outcome(edge.inbox.accept([request(session, "3")])), SessionBusy)
        async with store(database, max_in_flight=3) as other:
            assert isinstance(await outcome(other.inbox.accept([request(session, "4")])), SessionBusy)


async def test_what_waits_again_below_the_floor_is_found(database: str, late: asyncpg.Connection) -> None:
    """By the poll's second look, whoever did it: perhaps a try that was given up."""
    async with store(database) as owner:
        session = await opened(owner)
        await owner.inbox.accept([request(session, "1")])
        [claimed] = await owner.inbox.claim(session.ownership)
        await owner.inbox.unclaimed()
        await late.execute("update pgmcp.requests set claimed_epoch = null, claim = null where id = $1", claimed.key)
        assert await owner.inbox.claim(session.ownership) == []
        for _ in range(2):
            assert await owner.inbox.unclaimed() == [session.ownership]
        assert [each.key for each in await owner.inbox.claim(session.ownership)] == [claimed.key]


def test_a_floor_names_what_ran() -> None:
    assert ScanFloor.of("10:20:") == ScanFloor(20)
    assert ScanFloor.of("10:20:12,15") == ScanFloor(20, (12, 15))
    running = ",".join(str(xact) for xact in range(10, 11 + RUNNING))
    assert ScanFloor.of(f"10:90:{running}") == ScanFloor(10), "too many: from the oldest on"


def test_a_look_that_ends_after_its_floor_was_forgotten_raises_nothing() -> None:
    floors: ScanFloors[str] = ScanFloors()
    floors.rise("a", BOTTOM, ScanFloor(5))
    before = floors.of("a")
    floors.forget("a")
    floors.rise("a", before, ScanFloor(9))
    assert floors.of("a") is BOTTOM


def test_of_two_looks_from_one_floor_the_first_to_end_counts() -> None:
    floors: ScanFloors[str] = ScanFloors()
    before = floors.of("a")
    floors.rise("a", before, ScanFloor(5))
    floors.rise("a", before, ScanFloor(9))
    assert floors.of("a") == ScanFloor(5), "and the next look does not begin at the bottom"
