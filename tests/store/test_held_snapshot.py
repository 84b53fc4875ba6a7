"""While somebody holds a snapshot no dead version can go: what the message path looks at must not grow with them.

Buffers are counted, not seconds: the same on every machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from pgmcp.store.nodes import join
from pgmcp.store.schema.revisions import OLDEST
from pgmcp.types import ANONYMOUS, Cursor, NodeRecord
from tests.harness.buffers import Buffers, explained
from tests.harness.stores import Session, Store, answer, opened, request

WARM, CALLS = 100, 250
HOT = ("accept", "claim", "append", "read_streams", "release", "find_session", "unclaimed", "claimed_requests")
ROOM = 12
"""Buffers by which a statement may vary: index pages split, rows lie on one page or on two."""


@asynccontextmanager
async def held(address: str, *, wrote: bool) -> AsyncIterator[None]:
    """Another application's transaction, idle since it has read or written once."""
    connection = await asyncpg.connect(address, timeout=10)
    try:
        await connection.execute("begin isolation level repeatable read; select count(*) from pgmcp.sessions")
        if wrote:
            await connection.execute("create table public.elsewhere (n integer)")
        yield
    finally:
        await connection.close()


async def call(edge: Store, owner: Store, session: Session, number: int) -> None:
    """One call over another node, to its end."""
    asked = request(session, str(number))
    await edge.inbox.accept([asked])
    for claimed in await owner.inbox.claim(session.ownership):
        await owner.log.append(answer(claimed))
    assert asked.stream is not None
    page = await edge.log.read(Cursor(asked.stream, 1, 0))
    assert page.closed
    await edge.log.release(Cursor(asked.stream, 1, 1))


async def every_statement(edge: Store, owner: Store, sessions: list[Session], first: int) -> None:
    for number, session in enumerate(sessions * 3):
        await call(edge, owner, session, first + number)
    for session in sessions:
        await edge.inbox.find(session.session_id, ANONYMOUS)
        await edge.log.attach(session.session_id, ANONYMOUS, None)
    await owner.inbox.unclaimed()
    await owner.inbox.claimed()


async def joined(node: Store) -> None:
    record = NodeRecord(node.node, "n", "http://127.0.0.1:1", "1", OLDEST)
    await join(node.database, record)


@pytest.mark.filterwarnings("ignore:.*active log listener")
@pytest.mark.parametrize("wrote", [False, True], ids=["read", "wrote"])
async def test_no_statement_looks_at_what_is_over(database: str, wrote: bool) -> None:
    buffers = Buffers()
    async with explained(database, buffers) as edge, explained(database, buffers) as owner, held(database, wrote=wrote):
        await joined(edge)
        await joined(owner)
        sessions = [await opened(owner) for _ in range(3)]
        for number in range(WARM):  # the indexes get their roots
            await call(edge, owner, sessions[number % len(sessions)], number)
        await every_statement(edge, owner, sessions, 500)
        buffers.clear()
        await every_statement(edge, owner, sessions, 1000)
        before = {name: buffers.most(name) for name in HOT}
        for number in range(CALLS):
            await call(edge, owner, sessions[number % len(sessions)], 2000 + number)
        await owner.inbox.unclaimed()  # as every two seconds
        buffers.clear()
        await every_statement(edge, owner, sessions, 10000)
        after = {name: buffers.most(name) for name in HOT}
        worse = [
            f"{name}: {before[name]} {after[name]} {[*buffers.scanned(name)]}"
            for name in HOT
            if after[name] > before[name] + ROOM
        ]
        assert not worse, "\n".join(worse)
        renewed = [name for name in HOT for _, where in buffers.scanned(name) if "nodes" in where]
        assert renewed == [], "a node's row has a new version each second"
