"""The stores of several nodes on one database, and a look at what PostgreSQL holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import asyncpg
import pytest

from pgmcp.clock import Clock, Ids
from pgmcp.errors import PgmcpError
from pgmcp.ports import Inbox
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from pgmcp.store.encryption.key_wrapping import wrapping_of
from pgmcp.store.encryption.payloads import CLEAR, Payloads
from pgmcp.store.inbox import TableInbox
from pgmcp.store.line import Line
from pgmcp.store.log import TableLog
from pgmcp.store.statements import statement
from pgmcp.store.takeover import TableTakeovers
from pgmcp.types import (
    ANONYMOUS,
    Claimed,
    Entry,
    Message,
    NewSession,
    NodeId,
    Outcome,
    Ownership,
    Principal,
    RequestKey,
    SessionKey,
    StreamId,
)
from tests.harness.pooler import way_to
from tests.harness.waiting import eventually

BOUND = 10.0
IDS = Ids()
ELSEWHERE = "7000000000000000000/00000001"
"""The mark of a timeline that no server of a test has."""

BACKENDS = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
HELD = ("sessions", "journal", "streams", "events", "requests")


async def _open_gate() -> None:
    return None


@dataclass(slots=True)
class Store:
    """What one node has of the store."""

    node: NodeId
    database: Database
    inbox: TableInbox
    log: TableLog
    takeovers: TableTakeovers
    payloads: Payloads = CLEAR


@asynccontextmanager
async def store(
    address: str, node: NodeId | None = None, *, ids: Ids = IDS, gate: Callable[[], Awaitable[None]] = _open_gate,
    **settings: Any,
) -> AsyncIterator[Store]:  # fmt: skip
    """One node's store."""
    node, clock = node or NodeId(IDS.uuid()), Clock()
    with way_to(address, settings) as way:
        database = Database(Settings(**way), clock)
        await database.open()
        payloads = Payloads.of(database, wrapping_of(database.settings))
        await payloads.load()
        inbox, log = (
            TableInbox(database, node, clock, ids, gate, payloads),
            TableLog(database, node, clock, gate, payloads),
        )
        try:
            yield Store(node, database, inbox, log, TableTakeovers(database, node, gate, payloads), payloads)
        finally:
            await database.close()


@dataclass(slots=True)
class Session:
    """A session as its first owner knows it."""

    session_id: str
    ownership: Ownership
    standalone: StreamId

    @property
    def key(self) -> SessionKey:
        return self.ownership.session


@contextmanager
def own_sql() -> Iterator[None]:
    """Let ``Database.fetch`` take SQL of a test's own for a statement's name: it runs as a node's statements do."""

    def text(name: str, *args: Any) -> str:
        return statement(name, *args) if name.isidentifier() else name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgmcp.store.database.statement", text)
        yield


class _Keeping(Database):
    """Connections of a node; the direct ones are kept."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Clock())
        self.direct: list[asyncpg.Connection] = []

    async def connect(self, url: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
        self.direct.append(await super().connect(url, timeout=timeout, **options))
        return self.direct[-1]


@asynccontextmanager
async def line_connection(address: str) -> AsyncIterator[asyncpg.Connection]:
    """The connection of a line that is open, and says nothing by itself."""
    database = _Keeping(Settings(database_url=address))
    line = Line(
        database.settings, NodeId(IDS.uuid()), Clock(), IDS, on_payload=print, on_broadcast=print,
        on_reset=lambda *, crashed: None, on_lost=lambda: None, database=database,
    )  # fmt: skip
    await line.start()
    try:
        [connection] = database.direct
        yield connection
    finally:
        await line.stop()


class HasInbox(Protocol):
    """A node's store, on PostgreSQL or in memory."""

    @property
    def inbox(self) -> Inbox: ...


async def opened(owner: HasInbox, principal: Principal = ANONYMOUS) -> Session:
    """A session that ``owner`` has just created."""
    new = NewSession(IDS.token(), principal, "streamable", StreamId(IDS.uuid()))
    return Session(new.session_id, await owner.inbox.open_session(new), new.standalone)


def request(session: Session | str, rpc_id: str | None = "1", body: bytes = b"{}", **changes: Any) -> Message:
    """A client's message; without ``rpc_id`` a notification, which has no stream."""
    values: dict[str, Any] = {
        "key": RequestKey(IDS.uuid()),
        "session_id": session if isinstance(session, str) else session.session_id,
        "principal": ANONYMOUS,
        "rpc_id": rpc_id,
        "method": "tools/call" if rpc_id else "notifications/initialized",
        "name": "add" if rpc_id else None,
        "body": body,
        "context": b"sealed",
        "stream": StreamId(IDS.uuid()) if rpc_id else None,
    }
    return Message(**values | changes)


def answer(claimed: Claimed, seq: int | None = None, message: bytes = b"answer") -> Entry:
    """The entry that answers a claimed request."""
    assert claimed.stream is not None
    return Entry(
        claimed.ownership, claimed.stream, seq or claimed.next_seq, message, finishes=claimed.key,
        outcome=Outcome.ANSWERED,
    )  # fmt: skip


async def take_over(connection: asyncpg.Connection, session: SessionKey, node: NodeId) -> None:
    """Change the owner inside the caller's transaction: lock the row first, then write."""
    await connection.fetchrow("select epoch from pgmcp.sessions where id = $1 for update", session)
    await connection.execute("update pgmcp.sessions set owner = $2, epoch = epoch + 1 where id = $1", session, node)


async def rows_of(connection: asyncpg.Connection, session: SessionKey) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of a session in every table, in one snapshot."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        found = {
            "sessions": await connection.fetch("select * from pgmcp.sessions where id = $1", session),
            "events": await connection.fetch(
                "select e.* from pgmcp.events e join pgmcp.streams s on s.id = e.stream where s.session = $1 "
                "order by e.stream, e.seq",
                session,
            ),
        }
        for table, order in (("journal", "kind, detail"), ("streams", "id"), ("requests", "position")):
            text = f"select * from pgmcp.{table} where session = $1 order by {order}"
            found[table] = await connection.fetch(text, session)
    return {table: [tuple(row) for row in rows] for table, rows in found.items()}


async def row_counts(connection: asyncpg.Connection) -> dict[str, int]:
    """How many rows the tables hold that hang off sessions."""
    return {table: await connection.fetchval(f"select count(*) from pgmcp.{table}") for table in HELD}


async def check_streams(connection: asyncpg.Connection) -> None:
    """Numbers have no gap, and every stream stands right after its last event."""
    wrong = await connection.fetch(
        "select s.id, s.next_seq, array_agg(e.seq order by e.seq) from pgmcp.streams s "
        "left join pgmcp.events e on e.stream = s.id group by s.id, s.next_seq "
        "having count(e.seq) <> s.next_seq - 1 or coalesce(max(e.seq), 0) <> s.next_seq - 1"
    )
    assert wrong == []


async def promote(connection: asyncpg.Connection) -> None:
    """The numbers in the tables belong to another timeline now, as after a failover; every other connection is cut."""
    await connection.execute("update pgmcp.history set mark = $1", ELSEWHERE)
    await connection.execute(f"select pg_terminate_backend(pid) {BACKENDS}")


class Watcher:
    """Sees who waits for a lock in the test's database."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def waiting(self, word: str = "") -> int:
        """How many backends wait for a lock with a statement that contains the word."""
        count: int = await self._connection.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database() "
            "and wait_event_type = 'Lock' and query like '%' || $1 || '%'",
            word,
        )
        return count

    async def until_waiting(self, word: str, task: asyncio.Task[Any], count: int = 1) -> bool:
        """Until that many backends wait (True), or the task has ended before (False)."""

        async def seen() -> bool:
            return task.done() or await self.waiting(word) >= count

        await eventually(seen, f"nobody waits in {word}")
        return not task.done()


async def outcome(call: Awaitable[Any]) -> Any:
    """What a call returned, or the error of ours that it raised, within the bound."""
    async with asyncio.timeout(BOUND):
        try:
            return await call
        except PgmcpError as error:
            return error
