"""The ``Log`` port in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pgmcp.errors import Fenced, OutOfStep, SessionBusy, SessionUnknown, StreamTaken
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
    RequestKey,
    SessionFacts,
    Stand,
    StreamId,
    StreamKind,
)
from tests.harness.memory.tables import RequestRow, SessionRow, StreamRow
from tests.harness.memory.wire import Wire


class MemoryLog:
    """One node's log."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._cluster, self._node = wire, wire.cluster, wire.node

    async def append(self, entry: Entry) -> NodeId | None:
        return await self._wire.in_turn(
            "append", entry.ownership.session, lambda: self._append(entry), patience=math.inf, gated=True
        )

    def _append(self, entry: Entry) -> NodeId | None:
        self._fence(entry.ownership)
        stream = self._cluster.streams.get(entry.stream)
        if stream is None or stream.session != entry.ownership.session:
            message = f"Stream {entry.stream} is gone."
            raise OutOfStep(message)
        if entry.seq in stream.events:
            return stream.sink  # a repeat
        finished = self._finishable(entry.finishes, entry.ownership)
        if stream.closed or entry.seq != stream.next_seq or (entry.finishes is not None and finished is None):
            message = f"Stream {entry.stream} is closed or stands at another number than {entry.seq}."
            raise OutOfStep(message)
        if stream.kind is StreamKind.STANDALONE:
            self._make_room(stream, entry)
        stream.events[entry.seq] = (entry.message, entry.topic)
        stream.next_seq += 1
        if finished is not None:
            finished.outcome, finished.open = entry.outcome, stream.kind is StreamKind.REQUEST
            finished.finished_at = self._cluster.now()
            stream.unfinished = max(stream.unfinished - 1, 0)
            stream.closed = stream.kind is StreamKind.REQUEST and stream.unfinished == 0
        self._cluster.stored(self._node, "append", entry.ownership)
        return stream.sink

    def _fence(self, ownership: Ownership) -> SessionRow:
        row = self._cluster.owned_by(self._node, ownership)
        if row is None:
            message = f"Session {ownership.session} has another owner or is over; nothing was stored."
            raise Fenced(message)
        return row

    def _finishable(self, key: RequestKey | None, ownership: Ownership) -> RequestRow | None:
        row = None if key is None else self._cluster.requests.get(key)
        if row is None or row.finished or row.claimed_epoch not in {None, ownership.epoch}:
            return None
        return row

    def _make_room(self, stream: StreamRow, entry: Entry) -> None:
        most = self._cluster.settings.max_waiting_events * (1 if stream.sink is None else CARRIED)
        waiting = [seq for seq, (_, topic) in stream.events.items() if topic is not None and seq > stream.delivered_seq]
        for seq in waiting:
            replaced = stream.events[seq][1] == entry.topic
            cut = seq <= entry.seq - most
            if replaced or cut:
                del stream.events[seq]
            if cut and not replaced:
                stream.floor_seq = max(stream.floor_seq, seq)

    async def read(self, cursor: Cursor) -> Page:
        settings = self._cluster.settings
        return await self._wire.persist("read_streams", lambda: self._read(cursor), patience=settings.resume_hold)

    def _read(self, cursor: Cursor) -> Page:
        stream = self._carried(cursor)
        if stream is None or stream.floor_seq > max(cursor.after, cursor.floor):
            return Page(attached=False, closed=False)
        found: list[Event] = []
        size = 0
        for seq in sorted(seq for seq in stream.events if seq > cursor.after)[:PAGE]:
            message = stream.events[seq][0]
            size += len(message)
            if found and size > PAGE_BYTES:
                break
            found.append(Event(seq, message[:PAGE_BYTES], len(message[PAGE_BYTES:])))
        at_end = (found[-1].seq if found else cursor.after) >= stream.next_seq - 1
        return Page(attached=True, closed=stream.closed and at_end, events=tuple(found), more=not at_end)

    async def read_on(self, cursor: Cursor, start: int) -> bytes | None:
        def work() -> bytes | None:
            stream = self._carried(cursor)
            event = None if stream is None else stream.events.get(cursor.after + 1)
            return None if event is None else event[0][start : start + PAGE_BYTES]

        return await self._wire.persist("read_on", work, patience=self._cluster.settings.resume_hold)

    def _carried(self, cursor: Cursor) -> StreamRow | None:
        stream = self._cluster.streams.get(cursor.stream)
        mine = stream is not None and (stream.sink, stream.sink_epoch) == (self._node, cursor.sink_epoch)
        return stream if mine else None

    async def attach(
        self, session_id: str | None, principal: Principal, stream: StreamId | None
    ) -> Attachment | SessionFacts:
        patience = self._cluster.settings.resume_hold
        while True:
            seen = await self._wire.persist(
                "sink_epoch", lambda: self._sink_epoch(session_id, stream), patience=patience
            )
            work = lambda seen=seen: self._attach(session_id, principal, stream, seen)  # noqa: E731
            attached = await self._wire.persist("attach", work, patience=patience)
            if attached is not None:
                return attached

    def _sink_epoch(self, session_id: str | None, stream: StreamId | None) -> int | None:
        cluster, session = self._cluster, self._cluster.session_called(session_id)
        if stream is None:
            row = None if session is None else cluster.standalone_of(session.id)
        else:
            row = cluster.streams.get(stream)
        return None if row is None else row.sink_epoch

    def _attach(
        self, session_id: str | None, principal: Principal, stream_id: StreamId | None, seen: int | None
    ) -> Attachment | SessionFacts | None:
        cluster = self._cluster
        session = cluster.session_called(session_id)
        if session_id is None and stream_id in cluster.streams:
            session = cluster.sessions[cluster.streams[stream_id].session]
        if (
            session is None
            or session.principal != principal
            or session.transport != ("sse" if session_id is None else "streamable")
        ):
            message = "Session not found"
            raise SessionUnknown(message)
        facts = cluster.facts(session, orphaned=not cluster.lives(session.owner))
        stream = cluster.standalone_of(session.id) if stream_id is None else cluster.streams.get(stream_id)
        if stream is None or stream.session != session.id:
            return facts
        others = sum(row.sink is not None for row in cluster.streams_of(session.id) if row is not stream)
        if others >= cluster.settings.max_streams:
            raise SessionBusy
        if stream.sink_epoch != seen:
            return None
        self._displace(stream)
        replaced, stream.sink, stream.sink_epoch = stream.sink, self._node, stream.sink_epoch + 1
        return Attachment(
            facts, session.session_id, stream.id, stream.kind, stream.sink_epoch, stream.next_seq,
            stream.delivered_seq, stream.floor_seq, stream.closed, replaced,
        )  # fmt: skip

    def _displace(self, stream: StreamRow) -> None:
        if stream.kind is not StreamKind.STANDALONE or stream.sink is None or not self._cluster.lives(stream.sink):
            return
        now = self._cluster.now()
        lately = [at for at in stream.replaced_at if at > now - REPLACED_WITHIN_SECONDS]
        if len(lately) >= REPLACEMENTS:
            raise StreamTaken
        stream.replaced_at = [*lately, now]

    async def release(self, cursor: Cursor, *, keep: bool = False) -> bool:
        return await self._wire.persist("release", lambda: self._release(cursor, keep=keep))

    def _release(self, cursor: Cursor, *, keep: bool) -> bool:
        stream = self._carried(cursor)
        if stream is None:
            return False
        if stream.closed and cursor.after >= stream.next_seq - 1:
            for row in self._cluster.requests_of(stream.session):
                if row.message.stream == stream.id:
                    row.open = False
        stream.delivered_seq = max(stream.delivered_seq, min(cursor.after, stream.next_seq - 1))
        if not keep:
            stream.sink = None
        return True

    async def carried(self) -> set[tuple[StreamId, int]]:
        def work() -> set[tuple[StreamId, int]]:
            streams = self._cluster.streams.values()
            return {(row.id, row.sink_epoch) for row in streams if row.sink == self._node}

        return await self._wire.persist("carried_streams", work)

    async def drop_sink(self, ownership: Ownership, stream: StreamId | None) -> tuple[StreamId, NodeId | None] | None:
        def target() -> StreamRow | None:
            cluster = self._cluster
            row = cluster.standalone_of(ownership.session) if stream is None else cluster.streams.get(stream)
            return row if row is not None and row.session == ownership.session else None

        def work() -> StreamId | None:
            row = target()
            if row is None or self._cluster.owned_by(self._node, ownership) is None:
                return None
            if row.sink_epoch == epoch:
                row.sink, row.sink_epoch = None, epoch + 1
                self._cluster.stored(self._node, "drop_sink", ownership)
            return row.id if (row.sink, row.sink_epoch) == (None, epoch + 1) else None

        def seen() -> tuple[NodeId | None, int]:
            row = target()
            return (None, 0) if row is None else (row.sink, row.sink_epoch)

        sink, epoch = await self._wire.persist("sink_of", seen)  # a repeat could not name the sink any more
        dropped = await self._wire.persist("drop_sink", work, gated=True)
        return None if dropped is None else (dropped, sink)

    async def stands(self, streams: Sequence[StreamId]) -> dict[StreamId, Stand]:
        def work() -> dict[StreamId, Stand]:
            rows = [row for row in self._cluster.streams.values() if row.id in streams]
            return {row.id: Stand(row.next_seq, row.closed) for row in rows}

        return await self._wire.persist("stands", work)

    async def knows(self, stream: StreamId) -> bool:
        return await self._wire.persist("knows_stream", lambda: stream in self._cluster.streams)
