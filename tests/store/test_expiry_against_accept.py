"""Expiry beside what clients do: nothing that was accepted or carried in time is swept away with its session.

A sweep is held where it has its snapshot and has not looked at a row yet: its connection finds a ``clock_timestamp()``
that waits for the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from pgmcp.errors import TooManySessions
from pgmcp.store.retention import Retention
from pgmcp.store.statements import statement
from pgmcp.types import ANONYMOUS, Attachment, Cursor, NewSession, NodeId, Principal, SessionKey, StreamId
from tests.harness.stores import IDS, Session, Store, Watcher, opened, outcome, request, store

PAUSE = """
create schema pause;
create function pause.clock_timestamp() returns timestamptz language plpgsql as $$ begin
    perform pg_advisory_xact_lock_shared(4711);
    return pg_catalog.clock_timestamp();
end $$
"""
OLD = "update pgmcp.sessions set last_active_at = last_active_at - interval '2 hours'"
IDLE = "select clock_timestamp() - last_active_at > interval '1 hour' from pgmcp.sessions"


@pytest.fixture
async def hands(database: str) -> AsyncIterator[list[asyncpg.Connection]]:
    made = [await asyncpg.connect(database, timeout=10) for _ in range(3)]
    yield made
    for connection in made:
        await connection.close()


@pytest.fixture
async def node(database: str) -> AsyncIterator[Store]:
    async with store(database) as made:
        yield made


@pytest.fixture
async def session(node: Store, hands: list[asyncpg.Connection]) -> Session:
    """A session that nobody has used for hours."""
    made = await opened(node)
    await hands[0].execute(OLD)
    return made


@asynccontextmanager
async def chosen(node: Store, hands: list[asyncpg.Connection]) -> AsyncIterator[asyncio.Task[list[SessionKey]]]:
    """A sweep that has begun, and looks at the rows when the context ends."""
    holder, sweeper, eyes = hands
    await holder.execute(PAUSE)
    await sweeper.execute("set search_path = pause, pg_catalog")

    async def ask(name: str, *args: object) -> list[asyncpg.Record]:
        return list(await sweeper.fetch(statement(name, "pgmcp"), *args))

    slow: Any = SimpleNamespace(ask=ask, settings=node.database.settings, clock=node.database.clock)
    sweeps = Retention(slow, IDS)
    async with holder.transaction():
        await holder.execute("select pg_advisory_xact_lock(4711)")
        sweep = asyncio.create_task(sweeps.expire())
        await Watcher(eyes).until_waiting("expire_sessions", sweep)
        yield sweep


async def test_the_control_ends_an_idle_session(node: Store, session: Session, hands: list[asyncpg.Connection]) -> None:
    async with chosen(node, hands) as sweep:
        pass
    assert await sweep == [session.key]


@pytest.mark.parametrize("rpc_id", ["1", None], ids=["request", "message"])
async def test_what_is_accepted_while_a_sweep_chooses_stays(
    node: Store, session: Session, hands: list[asyncpg.Connection], rpc_id: str | None
) -> None:
    message = request(session, rpc_id)
    async with chosen(node, hands) as sweep:
        await node.inbox.accept([message])
    assert await sweep == []
    assert [each.key for each in await node.inbox.claim(session.ownership)] == [message.key]


async def test_what_is_accepted_and_taken_while_a_sweep_chooses_was_use(
    node: Store, session: Session, hands: list[asyncpg.Connection]
) -> None:
    """Nothing of it is left to be seen when the sweep comes to the row."""
    async with chosen(node, hands) as sweep:
        await node.inbox.accept([request(session, None)])
        await node.inbox.claim(session.ownership)
    assert await sweep == []


@pytest.mark.parametrize("lets_go", [False, True])
async def test_a_stream_that_is_attached_while_a_sweep_chooses_is_carried_on(
    node: Store, session: Session, hands: list[asyncpg.Connection], lets_go: bool
) -> None:
    async with chosen(node, hands) as sweep:
        attached = await node.log.attach(session.session_id, ANONYMOUS, None)
        assert isinstance(attached, Attachment)
        cursor = Cursor(attached.stream, attached.sink_epoch, 0)
        if lets_go:
            assert await node.log.release(cursor)
    assert await sweep == []
    if not lets_go:
        assert (await node.log.read(cursor)).attached


async def test_letting_go_waits_for_a_sweep_that_has_the_row(
    node: Store, session: Session, hands: list[asyncpg.Connection]
) -> None:
    """The sweep finds the stream carried, or the session used: never neither."""
    holder, _, eyes = hands
    attached = await node.log.attach(session.session_id, ANONYMOUS, None)
    assert isinstance(attached, Attachment)
    await holder.execute(OLD)
    async with holder.transaction():
        await holder.execute("select from pgmcp.sessions for update")
        letting_go = asyncio.ensure_future(node.log.release(Cursor(attached.stream, attached.sink_epoch, 0)))
        await Watcher(eyes).until_waiting("release", letting_go)
        assert await holder.fetchval("select pgmcp.in_use($1)", session.key)
    assert await outcome(letting_go) is True
    assert await holder.fetchval("select not pgmcp.in_use($1)", session.key)
    assert not await holder.fetchval(IDLE)
    assert await Retention(node.database, IDS).expire() == []


async def test_a_dead_sink_stays_where_somebody_works_with_the_session(
    node: Store, session: Session, hands: list[asyncpg.Connection]
) -> None:
    """It is dropped together with the note that the session was used until then, by the next sweep."""
    holder, dead = hands[0], NodeId(IDS.uuid())
    await holder.execute(
        "insert into pgmcp.nodes (node_id, name, address, state, expires_at, version, schema_revision) "
        "values ($1, 'crashed', '', 'dead', now(), '', '')",
        dead,
    )
    await holder.execute("update pgmcp.streams set sink = $1", dead)
    async with holder.transaction():
        await holder.execute("select from pgmcp.sessions for update")
        await Retention(node.database, IDS).prune()
        assert await holder.fetchval("select pgmcp.in_use($1)", session.key)
    await Retention(node.database, IDS).prune()
    assert await holder.fetchval("select not pgmcp.in_use($1)", session.key)
    assert not await holder.fetchval(IDLE)


ME = Principal("client", "https://issuer", "me")
LEFT = """
create schema pause;
create function pause.left(value text, length integer) returns text language plpgsql as $$ begin
    perform pg_advisory_xact_lock_shared(4711);
    return pg_catalog.left(value, length);
end $$
"""


@pytest.mark.parametrize("rpc_id", ["1", None], ids=["request", "message"])
async def test_what_is_accepted_while_room_is_made_keeps_its_session(
    database: str, hands: list[asyncpg.Connection], monkeypatch: pytest.MonkeyPatch, rpc_id: str | None
) -> None:
    """Another one makes room; here there is none."""
    holder, opener, eyes = hands
    await holder.execute(LEFT)
    await opener.execute("set search_path = pause, pg_catalog")
    async with store(database, max_sessions_per_caller=2) as node, store(database, max_sessions_per_caller=2) as other:
        first, second = await opened(node, ME), await opened(node, ME)
        kept = request(second, None, principal=ME)
        await node.inbox.accept([kept])
        persist = other.database.persist

        async def slowly(name: str, *args: object, **how: Any) -> list[asyncpg.Record]:
            if name.startswith("make_room"):
                return list(await opener.fetch(statement(name, "pgmcp"), *args))
            return await persist(name, *args, **how)

        monkeypatch.setattr(other.database, "persist", slowly)
        async with holder.transaction():
            await holder.execute("select pg_advisory_xact_lock(4711)")
            making = asyncio.ensure_future(other.inbox.make_room(ME))
            await Watcher(eyes).until_waiting("make_room", making)
            message = request(first, rpc_id, principal=ME)
            await node.inbox.accept([message])
        assert isinstance(await outcome(making), TooManySessions)
        assert [each.key for each in await node.inbox.claim(first.ownership)] == [message.key]
        assert [each.key for each in await node.inbox.claim(second.ownership)] == [kept.key]


async def test_room_is_made_once(database: str) -> None:
    """A repeat after a lost reply finds that there is room."""
    async with store(database, max_sessions_per_caller=2) as node:
        first, second = await opened(node, ME), await opened(node, ME)
        assert isinstance(await outcome(node.inbox.open_session(new())), TooManySessions)
        assert await node.inbox.make_room(ME) == [first.key]
        assert await node.inbox.make_room(ME) == []
        await opened(node, ME)
        assert await node.inbox.make_room(ME) == [second.key]


async def test_anonymous_callers_share_by_address(database: str) -> None:
    async with store(database, max_sessions_per_caller=2) as node:
        here = [await node.inbox.open_session(new(ANONYMOUS, "10.0.0.1")) for _ in range(2)]
        assert isinstance(await outcome(node.inbox.open_session(new(ANONYMOUS, "10.0.0.1"))), TooManySessions)
        for address in ("10.0.0.2", None, None, None, ""):  # nobody knows where the others are
            await node.inbox.open_session(new(ANONYMOUS, address))
        for address in ("10.0.0.2", None, ""):
            assert await node.inbox.make_room(ANONYMOUS, address) == []
        assert await node.inbox.make_room(ANONYMOUS, "10.0.0.1") == [here[0].session]
        assert await node.inbox.make_room(ANONYMOUS, "10.0.0.1") == []
        await node.inbox.open_session(new(ME, "10.0.0.1"))  # who has a name is not counted by address


def new(who: Principal = ME, address: str | None = None) -> NewSession:
    return NewSession(IDS.token(), who, "streamable", StreamId(IDS.uuid()), address)
