"""One stream as server-sent events.

Invariants:
- Nothing is written that is not in the log, and nothing twice: the cursor only moves forward (G2, G3).
- A response ends with the final chunk whenever the node ends it: clients count an abrupt end as a failure. Only what
  was cut in the middle ends abruptly.

Failure handling: while the database is away reads wait, and comments keep the connection open. A stream that has a
newer sink, or whose session is over, ends the response.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable
from pgmcp.ports import Log
from pgmcp.settings import Settings
from pgmcp.types import Event, Page, StreamId, StreamKind
from pgmcp.web.connection import PIECE_BYTES
from pgmcp.web.open_streams import OpenStream
from pgmcp.web.response_writer import ResponseWriter
from pgmcp.web.stream_reader import Interrupted, StreamReader
from pgmcp.web.token_expiry import TokenExpiry

SSE_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
NOTE_SECONDS = 10.0
"""Seconds between notes of how far an HTTP+SSE stream was carried."""


def event_id(stream: StreamId, seq: int) -> str:
    """The SSE id of an event: any node finds stream and place in it."""
    return f"{stream.hex}.{seq}"


class SseResponse:
    """Writes a stream as server-sent events.

    Args:
        open_stream: what is heard of the stream.
        kind: what is written to a standalone stream counts as delivered.
        poll: seconds between two looks without a wake-up.
        priming: whether the client's revision knows priming events (2025-11-25).
        notes_all: whether each step along a standalone stream is noted before it is made.
        expiry: of the token that opened the exchange.
        lost: what to answer when the stream turns out not to be there any more.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        reader: StreamReader,
        writer: ResponseWriter,
        *,
        kind: StreamKind,
        log: Log,
        settings: Settings,
        clock: Clock,
        poll: float,
        priming: bool,
        notes_all: bool,
        expiry: TokenExpiry,
        lost: Callable[[], Awaitable[Sequence[bytes]]],
    ) -> None:
        self._open_stream, self._reader, self._writer = open_stream, reader, writer
        self._kind, self._log, self._settings, self._clock = kind, log, settings, clock
        self._poll, self._priming, self._notes_all = poll, priming, notes_all
        self._expiry, self._lost = expiry, lost
        self._noted = clock.boottime()

    async def stream(self, *, first: Page | None, look: bool, preface: bytes) -> None:
        """See ``StreamResponse.stream``."""
        await self._writer.start(200, SSE_HEADERS)
        if preface:
            await self._writer.write(preface)
        if self._priming:
            last = event_id(self._open_stream.stream, self._reader.carried)
            await self._writer.write(f"id: {last}\r\n{self._retry}data: \r\n\r\n".encode())
        with self._writer.watching():
            finished = await self._carry(first, look=look)
        if not self._writer.gone:
            await self._writer.end(b"" if finished else self._farewell)

    async def _carry(self, page: Page | None, *, look: bool) -> bool:
        """Write what comes; whether the stream itself has ended."""
        while self._writer.goes_on:
            if page is not None:
                if page.events and not await self._write_events(page.events):
                    return False
                if page.closed or not page.attached:
                    return page.closed or await self._said_lost()
            page = await self._next_or_comment(look=look)
            look = False
        return False

    async def _said_lost(self) -> bool:
        """Say what can be said for a stream that the database has lost; whether there was anything to say."""
        lost = [] if self._writer.gone or self._open_stream.over else await self._lost()
        for answer in lost:  # without an id: it stands in no log
            await self._writer.put(b"event: message\r\ndata: %s\r\n\r\n" % answer)
        return bool(lost)

    @property
    def _retry(self) -> str:
        return f"retry: {self._settings.retry_ms}\r\n"

    @property
    def _farewell(self) -> bytes:
        """What precedes an end that is not the stream's end: come back, elsewhere."""
        return f"{self._retry}\r\n".encode() if self._priming else b""

    async def _noted_before(self, seq: int) -> bool:
        """Note that a standalone stream is about to be carried on to ``seq``; whether this is still its sink.

        A GET without ``Last-Event-ID`` starts after what was noted, and no message may go on two connections
        (2025-11-25, "Multiple Connections" 2), so the note comes before the writing. HTTP+SSE has no such GET: there
        the note only lets delivered events be pruned.
        """
        if self._kind is not StreamKind.STANDALONE:
            return True
        if not self._notes_all and self._clock.boottime() - self._noted < NOTE_SECONDS:
            return True
        self._noted = self._clock.boottime()
        try:
            return await self._log.release(self._reader.cursor(seq), keep=True)
        except DatabaseUnavailable:
            return False  # the client resumes from what it has

    async def _next_or_comment(self, *, look: bool) -> Page | None:
        wait = self._expiry.within(min(self._poll, max(0.0, self._settings.keepalive - self._writer.silent)))
        page = await self._reader.next(wait, look=look)
        if page is not None:
            return page
        if self._writer.silent >= self._settings.keepalive:
            await self._writer.comment()
        self._open_stream.moved.set()
        return None

    async def _write_events(self, events: Sequence[Event]) -> bool:
        """Write events, small ones together; whether all of them were written."""
        if not await self._writer.may_write() or not await self._noted_before(events[-1].seq):
            return False
        frames = bytearray()
        for event, following in zip(events, [*events[1:], None], strict=True):
            frames += b"event: message\r\nid: %s\r\ndata: " % event_id(self._open_stream.stream, event.seq).encode()
            frames += event.message
            if event.rest:
                if not await self._put_large(frames, event):
                    return False
                frames.clear()
            frames += b"\r\n\r\n"
            if following is None or len(frames) + len(following.message) > PIECE_BYTES:
                if not await self._writer.put(bytes(frames), inside=event.rest > 0):
                    return False
                self._reader.carried = event.seq
                frames.clear()
        return True

    async def _put_large(self, begun: bytearray, event: Event) -> bool:
        """Write an event that was begun, piece by piece, but for its end; whether that was done."""
        if not await self._writer.put(bytes(begun)):
            return False
        try:
            pieces = self._reader.message(event)
            await anext(pieces)  # it stands in what was begun
            async for piece in pieces:
                if not await self._writer.put(piece, inside=True):
                    return False
        except Interrupted:
            self._writer.abort()
            return False
        return True
