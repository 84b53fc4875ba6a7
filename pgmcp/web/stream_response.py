"""One HTTP exchange that carries one stream to its client.

Invariants:
- Nothing is written that is not in the log, and nothing twice: the cursor only moves forward (G2, G3).
- Trust is asked for before each piece of an event that is written, when there is nothing left to wait for, neither the
  database nor the client (G9). Without it the client gets comments only.
- A disconnect of the client ends the exchange and nothing else: the request runs on (disconnecting is not cancelling,
  2025-11-25 "Sending Messages to the Server" 6). So does a client that does not read (``Connection``).
- An exchange ends with the final chunk whenever the node ends it: clients count an abrupt end as a failure. Only what
  was cut in the middle ends abruptly.

- An exchange ends when its token has expired, as if the connection had broken: its client goes on with another one.
  What it has begun to write, it writes to its end.

Failure handling: while the database is away reads wait, and comments keep the connection open. A stream that has a
newer sink, or whose session is over, ends the exchange.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from pgmcp.clock import Clock
from pgmcp.cluster.lease import Lease
from pgmcp.errors import DatabaseUnavailable, NodeNotReady, PgmcpError, SessionUnknown
from pgmcp.ports import Log
from pgmcp.settings import Settings
from pgmcp.types import Event, Page, StreamId, StreamKind
from pgmcp.web.connection import PIECE_BYTES, Connection, Watch
from pgmcp.web.json_rpc import INTERNAL_ERROR, Refusal
from pgmcp.web.open_streams import OpenStream
from pgmcp.web.stream_reader import Interrupted, StreamReader
from pgmcp.web.token_expiry import TokenExpiry, expired

SSE_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
AUTO_WAIT_SECONDS = 0.1
"""Seconds for which an automatic answer waits for plain JSON to be enough."""

SUSPENDED_SECONDS = 120.0
"""Seconds without trust after which streams end, for clients to try elsewhere."""

NOTE_SECONDS = 10.0
"""Seconds between notes of how far an HTTP+SSE stream was carried."""

RELEASE_SECONDS = 1.0
"""Seconds that letting go of a stream may take when the exchange is over anyway."""


_FIRST_KEY = re.compile(rb'\s*\{(?:\s*"(?:jsonrpc|id)"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[^\s",{}]+)\s*,)*\s*"(\w+)"\s*:')


def event_id(stream: StreamId, seq: int) -> str:
    """The SSE id of an event: any node finds stream and place in it."""
    return f"{stream.hex}.{seq}"


class StreamResponse:
    """Carries a stream over one HTTP response.

    Args:
        open_stream: what is heard of the stream.
        sink_epoch: this exchange's turn as the stream's sink.
        after: the last event that the client has.
        floor: up to which number a client that named no event misses nothing.
        kind: a standalone stream may be idle for long, and what was written to it counts as delivered.
        priming: whether the client's revision knows priming events (2025-11-25).
        notes_all: whether each step along a standalone stream is noted before it is made.
        expiry: of the token that opened it.
        lost: what to answer when the stream turns out not to be there any more; nothing if that is as it should be.
        headers: further response headers.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        sink_epoch: int,
        after: int,
        kind: StreamKind,
        *,
        floor: int,
        log: Log,
        lease: Lease,
        settings: Settings,
        clock: Clock,
        connection: Connection,
        priming: bool,
        notes_all: bool,
        expiry: TokenExpiry,
        lost: Callable[[], Awaitable[Sequence[bytes]]],
        headers: dict[str, str],
    ) -> None:
        self._open_stream, self._kind = open_stream, kind
        self._carried = after
        self._poll = settings.poll if kind is StreamKind.REQUEST else settings.idle_poll
        self._reader = StreamReader(
            open_stream, sink_epoch, after, floor, log, clock, min(settings.poll, settings.keepalive)
        )
        self._log, self._lease, self._settings, self._clock, self._expiry = log, lease, settings, clock, expiry
        self._connection = connection
        self._priming, self._notes_all, self._headers = priming, notes_all, headers
        self._lost = lost
        self._left = False
        self._written = self._noted = clock.boottime()

    @property
    def _gone(self) -> bool:
        """Whether the client has left, or was dropped."""
        return self._left or self._connection.gone

    # -- plain JSON ------------------------------------------------------------------------------------------------

    async def handshake(self) -> Page:
        """Wait for the answer to ``initialize``.

        Raises:
            Refusal: the server refused it, or ended before it answered.
        """
        answers = await self._collect()
        if not answers:
            raise Refusal(503, "The server ended before it answered initialize; look at its log.", INTERNAL_ERROR)
        error = json.loads(await self._whole(answers[0])).get("error")
        if error is not None:
            raise Refusal(400, str(error.get("message")), int(error.get("code", INTERNAL_ERROR)))
        return Page(attached=True, closed=True, events=tuple(answers))

    async def answer_json(self, *, batch: bool) -> None:
        """Wait for the stream's answers and send them as one JSON body.

        Raises:
            SessionUnknown: the session ended before the answer was there.
            NodeNotReady: this node leaves; the same request, sent again, gets the answer on another one.
            Refusal: another exchange carries the stream now.
        """
        await self.send_json(await self._collect(), batch=batch)

    async def answer_auto(self, *, batch: bool) -> None:
        """Send plain JSON if that is soon enough and all there is, else server-sent events."""
        first = await self._reader.next(AUTO_WAIT_SECONDS, look=False)
        if first is not None and first.closed and all(_is_answer(event) for event in first.events):
            await self.send_json(first.events, batch=batch)
        else:
            await self.stream(first=first)

    async def _collect(self) -> Sequence[Event]:
        answers: list[Event] = []
        with self._watching():
            while not self._gone:
                if self._expiry.passed:
                    raise expired()
                page = await self._reader.next(self._expiry.within(self._poll), look=False)
                if page is None:
                    self._open_stream.moved.set()
                    continue
                answers += [event for event in page.events if _is_answer(event)]
                if page.closed:
                    return answers
                if not page.attached:
                    if lost := await self._lost():
                        return [Event(0, answer) for answer in lost]
                    raise self._why_over()
        return []

    def _why_over(self) -> PgmcpError | Refusal:
        if self._open_stream.ended:
            return SessionUnknown("Session not found")
        if self._open_stream.leaving:
            return NodeNotReady("This node is leaving; send the same request again.")
        return Refusal(409, "The same request was sent again; its answer goes to the newer exchange")

    async def send_json(self, answers: Sequence[Event], *, batch: bool) -> None:
        """Send answers as one JSON body."""
        if self._gone or not answers:
            return
        await self._lease.acting()
        around = (b"[", b",", b"]") if batch else (b"", b"", b"")
        length = sum(event.size for event in answers) + (len(answers) + 1 if batch else 0)
        await self._start(200, {"content-type": "application/json", "content-length": str(length)})
        if await self._put_json(answers, *around):
            self._carried = self._reader.after

    async def _put_json(self, answers: Sequence[Event], start: bytes, between: bytes, end: bytes) -> bool:
        """Write answers one after the other; whether all of it was written."""
        held = start  # what is written with what follows, for the last piece has to say that it is the last
        try:
            for number, event in enumerate(answers):
                held += between if number else b""
                async for piece in self._reader.message(event):
                    if len(held) + len(piece) > PIECE_BYTES:
                        if held and not await self._put(held, inside=True):
                            return False
                        held = b""
                    held += piece
        except Interrupted:
            self._connection.abort()
            return False
        return await self._put(held + end, inside=True, more=False)

    async def _whole(self, event: Event) -> bytes:
        """The message of an event, however large."""
        try:
            return b"".join([piece async for piece in self._reader.message(event)])
        except Interrupted:
            raise self._why_over() from None

    # -- server-sent events ----------------------------------------------------------------------------------------

    async def stream(self, *, first: Page | None = None, look: bool = False, preface: bytes = b"") -> None:
        """Carry the stream as server-sent events until it ends, or this exchange does.

        Args:
            preface: what stands before the first event.
            first: what was read already.
            look: read at once: the stream may have events that nobody announces any more.
        """
        await self._start(200, SSE_HEADERS)
        if preface:
            await self._write(preface)
        if self._priming:
            await self._write(
                f"id: {event_id(self._open_stream.stream, self._carried)}\r\n{self._retry}data: \r\n\r\n".encode()
            )
        with self._watching():
            finished = await self._carry(first, look=look)
        if not self._gone:
            await self._connection.send({"type": "http.response.body", "body": b"" if finished else self._farewell})

    async def _carry(self, page: Page | None, *, look: bool) -> bool:
        """Write what comes; whether the stream itself has ended."""
        while not self._gone and not self._expiry.passed and self._lease.suspended_for < SUSPENDED_SECONDS:
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
        lost = [] if self._gone or self._open_stream.over else await self._lost()
        for answer in lost:  # without an id: it stands in no log
            await self._put(b"event: message\r\ndata: %s\r\n\r\n" % answer)
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
        silent = self._clock.boottime() - self._written
        wait = self._expiry.within(min(self._poll, max(0.0, self._settings.keepalive - silent)))
        page = await self._reader.next(wait, look=look)
        if page is not None:
            return page
        await self._comment(self._clock.boottime() - self._written < self._settings.keepalive)
        self._open_stream.moved.set()
        return None

    async def _comment(self, needless: bool) -> None:
        if not needless:
            await self._write(b": \r\n\r\n")

    async def _write_events(self, events: Sequence[Event]) -> bool:
        """Write events, small ones together; whether all of them were written."""
        if not await self._may_write() or not await self._noted_before(events[-1].seq):
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
                if not await self._put(bytes(frames), inside=event.rest > 0):
                    return False
                self._carried = event.seq
                frames.clear()
        return True

    async def _put_large(self, begun: bytearray, event: Event) -> bool:
        """Write an event that was begun, piece by piece, but for its end; whether that was done."""
        if not await self._put(bytes(begun)):
            return False
        try:
            pieces = self._reader.message(event)
            await anext(pieces)  # it stands in what was begun
            async for piece in pieces:
                if not await self._put(piece, inside=True):
                    return False
        except Interrupted:
            self._connection.abort()
            return False
        return True

    async def _put(self, text: bytes, *, inside: bool = False, more: bool = True) -> bool:
        """Write what may be written with trust only, piece by piece; whether all of it was written.

        Args:
            inside: nothing else, no comment either, may come before it.
            more: whether the body goes on after it.
        """
        for start in range(0, len(text), PIECE_BYTES):
            if not await self._may_write(inside=inside or start > 0):
                return False
            end = start + PIECE_BYTES
            self._written = self._clock.boottime()
            await self._connection.send(
                {"type": "http.response.body", "body": text[start:end], "more_body": more or end < len(text)}
            )
        return not self._gone

    async def _may_write(self, *, inside: bool = False) -> bool:
        """Return True when an event may be written at once: trust is asked for last (G9). False: never any more.

        Args:
            inside: what is being written cannot stop here; without trust for too long, the connection is cut.
        """
        while not self._gone and self._lease.suspended_for < SUSPENDED_SECONDS:
            await self._connection.ready()
            if self._expiry.passed and not inside:
                return False
            if self._lease.trusted:
                return not self._gone
            if await self._lease.trusted_within(self._settings.keepalive):
                continue
            if not inside:
                await self._comment(needless=False)
                if self._open_stream.over:
                    return False
        if inside:
            self._connection.abort()
        return False

    async def _write(self, chunk: bytes) -> None:
        self._written = self._clock.boottime()
        await self._connection.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in (headers | self._headers).items()]
        await self._connection.send({"type": "http.response.start", "status": status, "headers": pairs})

    # -- the client's side -----------------------------------------------------------------------------------------

    def _watching(self) -> Watch:
        return Watch(self._connection.receive, self._on_gone)

    def _on_gone(self) -> None:
        self._left = True
        self._open_stream.moved.set()

    async def release(self) -> None:
        """Let go of the stream: note how far it was carried."""
        self._reader.close()
        carried = 0 if self._gone and self._kind is StreamKind.REQUEST else self._carried
        with suppress(PgmcpError, TimeoutError):
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._log.release(self._reader.cursor(carried))


def _is_answer(event: Event) -> bool:
    """Whether an event is an answer; said by the first key that is neither ``jsonrpc`` nor ``id``."""
    found = _FIRST_KEY.match(event.message)
    if found is None and not event.rest:
        return "method" not in json.loads(event.message)
    return found is None or found[1] in {b"result", b"error"}
