"""The event log: what clients are sent, stored before it is said.

Invariants:
- An event is stored under the owner's fence, at the number that its stream expects; numbers have no gaps.
- A request is finished in the statement that stores its answer.
- A reader gets events only while it is the stream's sink; the newest sink wins.
- A large event is read in pieces: it is never in this node's memory as a whole because of its reader.
- The event that closes a stream, appended while this node was its sink, is handed to that sink's reader without asking
  the table: it was committed, and stored before any replacement. Others are read, since a reader that still has a
  future must notice that it was replaced.

Failure handling: a repeated append finds its own event and reports it as stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import asyncpg

from pgmcp.clock import Clock
from pgmcp.errors import Fenced, OutOfStep, PgmcpError, SessionBusy, SessionUnknown, StreamTaken
from pgmcp.store.database import Database
from pgmcp.store.encryption.payloads import CLEAR, Payloads, place_of_event, stored_from
from pgmcp.store.group_commit import GroupCommit
from pgmcp.store.rows import facts_of
from pgmcp.store.statements import LockWait
from pgmcp.types import (
    CARRIED,
    PAGE,
    PAGE_BYTES,
    REPLACED_WITHIN_SECONDS,
    REPLACEMENTS,
    Attachment,
    Cursor,
    Entry,
    Event,
    NodeId,
    Ownership,
    Page,
    Principal,
    SessionFacts,
    Stand,
    StreamId,
    StreamKind,
)

LAST_EVENTS, LAST_BYTES = 1024, 64 * 1024
"""How many closing events are kept for their readers on this node, and how large one of them may be."""

TAKEN = (
    f"Other connections that listen to this session have replaced each other {REPLACEMENTS} times within "
    f"{REPLACED_WITHIN_SECONDS:g} s. Listen with one connection only, or end the one that has the stream and come "
    "back later."
)


class TableLog:
    """The ``Log`` port on PostgreSQL, for one node.

    Args:
        database: the node's pool.
        node: who appends, and whose edge reads.
        gate: awaited before each write of an owner; waits for trust, raises ``Fenced``.
        payloads: seals and opens what is stored.
    """

    def __init__(
        self,
        database: Database,
        node: NodeId,
        clock: Clock,
        gate: Callable[[], Awaitable[None]],
        payloads: Payloads = CLEAR,
    ) -> None:
        self._database, self._node, self._gate, self._payloads = database, node, gate, payloads
        self._settings = database.settings
        self._hold, self._resume_hold = database.settings.hold, database.settings.resume_hold
        self._appends: GroupCommit[Entry, NodeId | None] = GroupCommit(
            self._send_appends, clock, lambda entry: entry.ownership.session, gate
        )
        self._last: dict[tuple[StreamId, int], Event] = {}
        self._reads: GroupCommit[Cursor, Page] = GroupCommit(self._send_reads, clock, lambda cursor: cursor.stream)
        self._releases: GroupCommit[tuple[Cursor, bool], bool] = GroupCommit(
            self._send_releases, clock, lambda note: note[0].stream
        )

    @property
    def closing(self) -> int:
        """Closing events that are kept for their readers here."""
        return len(self._last)

    async def append(self, entry: Entry) -> NodeId | None:
        """See ``Log.append``."""
        # An event has its number, and what came after it would leave a gap: only the database refuses it.
        return await self._appends.put(entry, patience=None, size=len(entry.message))

    async def _send_appends(self, entries: Sequence[Entry], lock_wait: LockWait) -> list[NodeId | PgmcpError | None]:
        messages = [await self._payloads.seal_event(entry.message, entry.stream, entry.seq) for entry in entries]
        rows = await self._database.fetch_sized(
            "append",
            [entry.ownership.session for entry in entries],
            [entry.ownership.epoch for entry in entries],
            [entry.stream for entry in entries],
            [entry.seq for entry in entries],
            messages,
            [entry.finishes for entry in entries],
            [entry.outcome for entry in entries],
            self._node,
            [entry.topic for entry in entries],
            self._settings.max_waiting_events,
            self._settings.use_precision,
            self._settings.max_waiting_events * CARRIED,
            size=max(len(message) for message in messages),
            lock_wait=lock_wait,
        )
        for row, entry in zip(rows, entries, strict=True):
            if row["closed"] and row["sink"] == self._node and len(entry.message) <= LAST_BYTES:
                self._keep(entry, row["sink_epoch"])
        return [_stored(row, entry) for row, entry in zip(rows, entries, strict=True)]

    def _keep(self, entry: Entry, sink_epoch: int) -> None:
        """Keep a closing event for its reader here; the oldest goes where nobody came."""
        if len(self._last) >= LAST_EVENTS:
            del self._last[next(iter(self._last))]
        self._last[entry.stream, sink_epoch] = Event(entry.seq, entry.message)

    async def read(self, cursor: Cursor) -> Page:
        """See ``Log.read``."""
        last = self._last.pop((cursor.stream, cursor.sink_epoch), None)
        if last is not None and last.seq == cursor.after + 1:
            return Page(attached=True, closed=True, events=(last,))
        page = await self._reads.put(cursor, patience=self._resume_hold)
        if page.closed:
            self._last.pop((cursor.stream, cursor.sink_epoch), None)  # it was kept while this was read
        return page

    async def _send_reads(self, cursors: Sequence[Cursor], _: LockWait) -> list[Page | PgmcpError]:
        rows = await self._database.fetch(
            "read_streams",
            [cursor.stream for cursor in cursors],
            [cursor.sink_epoch for cursor in cursors],
            [cursor.after for cursor in cursors],
            self._node,
            PAGE,
            PAGE_BYTES,
            [cursor.floor for cursor in cursors],
        )
        found: dict[int, list[asyncpg.Record]] = {}
        for row in rows:
            found.setdefault(row["n"] - 1, []).append(row)
        return [await self._page(cursor, found.get(place, [])) for place, cursor in enumerate(cursors)]

    async def _page(self, cursor: Cursor, rows: list[asyncpg.Record]) -> Page | PgmcpError:
        if not rows:
            return Page(attached=False, closed=False)
        events = []
        for row in rows:
            if row["seq"] is not None:
                place = place_of_event(cursor.stream, row["seq"])
                try:
                    message, rest = await self._payloads.open_first(row["message"], row["size"], place)
                except PgmcpError as error:
                    return error  # of this stream only
                events.append(Event(row["seq"], message, rest))
        last = events[-1].seq if events else cursor.after
        return Page(
            attached=True,
            closed=rows[0]["closed"] and last >= rows[0]["next_seq"] - 1,
            more=last < rows[0]["next_seq"] - 1,
            events=tuple(events),
        )

    async def read_on(self, cursor: Cursor, start: int) -> bytes | None:
        """See ``Log.read_on``."""
        at = (cursor.stream, cursor.sink_epoch, self._node, cursor.after + 1)
        what = (start + 1, PAGE_BYTES, stored_from(start) + 1)
        rows = await self._database.persist("read_on", *at, *what, patience=self._resume_hold)
        if not rows or not rows[0]["sealed"]:
            return rows[0]["piece"] if rows else None
        piece, place = rows[0]["piece"], place_of_event(cursor.stream, cursor.after + 1)
        last = stored_from(start) + len(piece) >= rows[0]["size"]
        return await self._payloads.open_piece(piece, place, start, last=last)

    async def attach(
        self, session_id: str | None, principal: Principal, stream: StreamId | None
    ) -> Attachment | SessionFacts:
        """See ``Log.attach``."""
        who = (principal.client_id, principal.issuer, principal.subject)

        async def once() -> list[asyncpg.Record]:
            while True:
                seen = await self._database.fetch("sink_epoch", session_id, stream)
                most, epoch = self._settings.max_streams, seen[0]["sink_epoch"] if seen else None
                bounds = (most, epoch, REPLACEMENTS, REPLACED_WITHIN_SECONDS, self._settings.use_precision)
                rows = await self._database.fetch("attach", session_id, *who, stream, self._node, *bounds)
                if not rows or rows[0]["full"] or not rows[0]["moved"]:
                    return rows  # else another one attached in between, and this one is the newer

        rows = await self._database.retry(once, patience=self._resume_hold)
        if not rows:
            message = "Session not found"
            raise SessionUnknown(message)
        row = rows[0]
        if row["stream"] is None and row["full"]:
            message = f"This session has {self._settings.max_streams} streams open; close one before you open another."
            raise SessionBusy(message)
        if row["stream"] is None and row["displaces"]:
            raise StreamTaken(TAKEN)
        facts = facts_of(row, row["session"])
        if row["stream"] is None:
            return facts
        return Attachment(
            facts=facts,
            session_id=row["session_id"],
            stream=StreamId(row["stream"]),
            kind=StreamKind(row["kind"]),
            sink_epoch=row["sink_epoch"],
            next_seq=row["next_seq"],
            delivered_seq=row["delivered_seq"],
            floor_seq=row["floor_seq"],
            closed=row["closed"],
            replaced=None if row["replaced"] is None else NodeId(row["replaced"]),
        )

    async def release(self, cursor: Cursor, *, keep: bool = False) -> bool:
        """See ``Log.release``."""
        return await self._releases.put((cursor, keep), patience=self._hold)

    async def _send_releases(
        self, notes: Sequence[tuple[Cursor, bool]], lock_wait: LockWait
    ) -> list[bool | PgmcpError]:
        rows = await self._database.fetch(
            "release",
            [cursor.stream for cursor, _ in notes],
            [cursor.sink_epoch for cursor, _ in notes],
            [cursor.after for cursor, _ in notes],
            self._node,
            [keep for _, keep in notes],
            self._settings.use_precision,
            lock_wait=lock_wait,
        )
        held = {row["id"] for row in rows}
        return [cursor.stream in held for cursor, _ in notes]

    async def carried(self) -> set[tuple[StreamId, int]]:
        """See ``Log.carried``."""
        rows = await self._database.ask("carried_streams", self._node)
        return {(StreamId(row["id"]), row["sink_epoch"]) for row in rows}

    async def drop_sink(self, ownership: Ownership, stream: StreamId | None) -> tuple[StreamId, NodeId | None] | None:
        """See ``Log.drop_sink``."""
        # The sink is read first: a repeat after a lost reply could not name it any more.
        found = await self._database.persist("sink_of", ownership.session, stream, patience=self._hold)
        if not found:
            return None
        what = (ownership.session, self._node, ownership.epoch, stream, found[0]["sink_epoch"])
        limits = (self._settings.use_precision,)
        rows = await self._database.persist("drop_sink", *what, *limits, patience=self._hold, gate=self._gate)
        if not rows:
            return None
        return StreamId(rows[0]["stream"]), None if found[0]["sink"] is None else NodeId(found[0]["sink"])

    async def stands(self, streams: Sequence[StreamId]) -> dict[StreamId, Stand]:
        """See ``Log.stands``."""
        rows = await self._database.persist("stands", list(streams), patience=self._hold)
        return {StreamId(row["id"]): Stand(row["next_seq"], row["closed"]) for row in rows}

    async def knows(self, stream: StreamId) -> bool:
        """See ``Log.knows``."""
        return bool(await self._database.persist("knows_stream", stream, patience=self._hold))


def _stored(row: asyncpg.Record, entry: Entry) -> NodeId | PgmcpError | None:
    if row["fenced"]:
        return Fenced("The session has another owner or is over; nothing was stored.")
    if not row["stored"]:
        return OutOfStep(f"One of its streams is closed or stands at another number than {entry.seq}.")
    return None if row["sink"] is None else NodeId(row["sink"])
