"""One HTTP exchange that carries one stream to its client.

Invariants:
- Nothing is written that is not in the log, and nothing twice: the cursor only moves forward (G2, G3).
- Trust is asked for before each write of events; without it the client gets comments only (G9).
- A disconnect of the client ends the exchange and nothing else: the request runs on (disconnecting is not cancelling,
  2025-11-25 "Sending Messages to the Server" 6).
- An exchange ends with the final chunk whenever the node ends it: clients count an abrupt end as a failure.

Failure handling: while the database is away reads wait, and comments keep the connection open. A stream that has a
newer sink, or whose session is over, ends the exchange.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from starlette.types import Receive, Send

from pgmcp.clock import Clock
from pgmcp.cluster.lease import Lease
from pgmcp.errors import DatabaseUnavailable, NodeNotReady, PgmcpError, SessionUnknown
from pgmcp.ports import Log
from pgmcp.settings import Settings
from pgmcp.types import Cursor, Event, Page, StreamId, StreamKind
from pgmcp.web.call import Watch, abort
from pgmcp.web.tails import Tail
from pgmcp.web.wire import INTERNAL_ERROR, Refusal

logger = logging.getLogger(__name__)

SSE_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
AUTO_WAIT = 0.1
"""Seconds for which an automatic answer waits for plain JSON to be enough."""

SUSPENDED = 120.0
"""Seconds without trust after which streams end, for clients to try elsewhere."""

NOTE_EVERY = 10.0
"""Seconds between notes of how far an HTTP+SSE stream was carried."""

DROP = 1.0
"""Seconds that letting go of a stream may take when the exchange is over anyway."""


def event_id(stream: StreamId, seq: int) -> str:
    """The SSE id of an event: any node finds stream and place in it."""
    return f"{stream.hex}.{seq}"


class Exchange:
    """Carries a stream over one HTTP response.

    Args:
        tail: the ear on the stream.
        sink_epoch: this exchange's turn as the stream's sink.
        after: the last event that the client has.
        kind: a standalone stream may be idle for long, and what was written to it counts as delivered.
        priming: whether the client's revision knows priming events (2025-11-25).
        notes_all: whether each step along a standalone stream is noted before it is made.
        lost: what to answer when the stream turns out not to be there any more; nothing if that is as it should be.
        headers: further response headers.
    """

    def __init__(
        self,
        tail: Tail,
        sink_epoch: int,
        after: int,
        kind: StreamKind,
        *,
        log: Log,
        lease: Lease,
        settings: Settings,
        clock: Clock,
        receive: Receive,
        send: Send,
        priming: bool,
        notes_all: bool,
        lost: Callable[[], Awaitable[Sequence[bytes]]],
        headers: dict[str, str],
    ) -> None:
        self._tail, self._sink_epoch, self._kind = tail, sink_epoch, kind
        self._read = self._carried = after
        self._poll = settings.poll if kind is StreamKind.REQUEST else settings.idle_poll
        self._log, self._lease, self._settings, self._clock = log, lease, settings, clock
        self._receive, self._send = receive, send
        self._priming, self._notes_all, self._headers = priming, notes_all, headers
        self._lost = lost
        self._gone = False
        self._reading: asyncio.Task[Page] | None = None
        self._written = self._noted = clock.boottime()

    # -- reading ---------------------------------------------------------------------------------------------------

    async def next_page(self, seconds: float, *, look: bool) -> Page | None:
        """What comes next in the stream; None when nothing does within ``seconds``.

        Args:
            seconds: how long to wait for a wake-up.
            look: read at once, before any wake-up.
        """
        if not look and not await self._clock.wait(self._tail.moved, seconds):
            return None
        self._tail.moved.clear()
        if self._tail.over:
            return Page(attached=False, closed=False)
        page = await self._page()
        if page is None:
            return None
        if page.events:
            self._read = page.events[-1].seq
            if page.more:
                self._tail.moved.set()
        return page

    async def _page(self) -> Page | None:
        """Read on; None when the database takes longer than comments may wait. The same read is awaited again then."""
        again = self._reading is not None
        if self._reading is None:
            cursor = Cursor(self._tail.stream, self._sink_epoch, self._read)
            self._reading = asyncio.create_task(self._log.read(cursor))
        done, _ = await asyncio.wait({self._reading}, timeout=min(self._settings.poll, self._settings.keepalive))
        if not done:
            return None
        reading, self._reading = self._reading, None
        if again:
            self._tail.moved.set()  # what moved while it was read, it may have missed
        try:
            return reading.result()
        except DatabaseUnavailable:
            return None

    # -- plain JSON ------------------------------------------------------------------------------------------------

    async def handshake(self) -> Page:
        """Wait for the answer to ``initialize``.

        Raises:
            Refusal: the server refused it, or ended before it answered.
        """
        answers = await self._collect()
        if not answers:
            raise Refusal(503, "The server ended before it answered initialize; look at its log.", INTERNAL_ERROR)
        error = json.loads(answers[0].message).get("error")
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
        first = await self.next_page(AUTO_WAIT, look=False)
        if first is not None and first.closed and all(_is_answer(event) for event in first.events):
            await self.send_json(first.events, batch=batch)
        else:
            await self.stream(first=first)

    async def _collect(self) -> Sequence[Event]:
        answers: list[Event] = []
        with self._watching():
            while not self._gone:
                page = await self.next_page(self._poll, look=False)
                if page is None:
                    self._tail.moved.set()
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
        if self._tail.ended:
            return SessionUnknown("Session not found")
        if self._tail.leaving:
            return NodeNotReady("This node is leaving; send the same request again.")
        return Refusal(409, "The same request was sent again; its answer goes to the newer exchange")

    async def send_json(self, answers: Sequence[Event], *, batch: bool) -> None:
        """Send answers as one JSON body."""
        if self._gone or not answers:
            return
        await self._lease.acting()
        body = answers[0].message if not batch else b"[" + b",".join(event.message for event in answers) + b"]"
        await self._start(200, {"content-type": "application/json", "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})
        self._carried = self._read

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
                f"id: {event_id(self._tail.stream, self._carried)}\r\n{self._retry}data: \r\n\r\n".encode()
            )
        with self._watching():
            finished = await self._carry(first, look=look)
        if not self._gone:
            await self._send({"type": "http.response.body", "body": b"" if finished else self._farewell})

    async def _carry(self, page: Page | None, *, look: bool) -> bool:
        """Write what comes; whether the stream itself has ended."""
        while not self._gone and self._lease.suspended_for < SUSPENDED:
            if page is not None and page.events and not self._lease.trusted:
                await self._comment(await self._lease.trusted_within(self._settings.keepalive))
                continue
            if page is not None:
                if page.events and not await self._noted_before(page.events[-1].seq):
                    return False
                await self._write_events(page.events)
                if page.closed or not page.attached:
                    return page.closed or await self._said_lost()
            page = await self._next_or_comment(look=look)
            look = False
        return False

    async def _said_lost(self) -> bool:
        """Say what can be said for a stream that the database has lost; whether there was anything to say."""
        lost = [] if self._gone or self._tail.over else await self._lost()
        for answer in lost:  # without an id: it stands in no log
            await self._write(b"event: message\r\ndata: %s\r\n\r\n" % answer)
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
        if not self._notes_all and self._clock.boottime() - self._noted < NOTE_EVERY:
            return True
        self._noted = self._clock.boottime()
        try:
            return await self._log.release(Cursor(self._tail.stream, self._sink_epoch, seq), keep=True)
        except DatabaseUnavailable:
            return False  # the client resumes from what it has

    async def _next_or_comment(self, *, look: bool) -> Page | None:
        silent = self._clock.boottime() - self._written
        page = await self.next_page(min(self._poll, max(0.0, self._settings.keepalive - silent)), look=look)
        if page is not None:
            return page
        await self._comment(self._clock.boottime() - self._written < self._settings.keepalive)
        self._tail.moved.set()
        return None

    async def _comment(self, needless: bool) -> None:
        if not needless:
            await self._write(b": \r\n\r\n")

    async def _write_events(self, events: Sequence[Event]) -> None:
        if not events:
            return
        await self._write(
            b"".join(
                b"event: message\r\nid: %s\r\ndata: %s\r\n\r\n"
                % (event_id(self._tail.stream, event.seq).encode(), event.message)
                for event in events
            )
        )
        self._carried = events[-1].seq

    async def _write(self, chunk: bytes) -> None:
        self._written = self._clock.boottime()
        try:
            async with asyncio.timeout(self._settings.write_timeout):
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            logger.info("a client has not read from its stream for %s s", self._settings.write_timeout)
            self._on_gone()  # it can resume; what it did not read is in the log
            abort(self._receive)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in (headers | self._headers).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    # -- the client's side -----------------------------------------------------------------------------------------

    def _watching(self) -> Watch:
        return Watch(self._receive, self._on_gone)

    def _on_gone(self) -> None:
        self._gone = True
        self._tail.moved.set()

    async def release(self) -> None:
        """Let go of the stream: note how far it was carried."""
        if self._reading is not None:
            self._reading.cancel()
        carried = 0 if self._gone and self._kind is StreamKind.REQUEST else self._carried
        with suppress(PgmcpError, TimeoutError):
            async with asyncio.timeout(DROP):
                await self._log.release(Cursor(self._tail.stream, self._sink_epoch, carried))


def _is_answer(event: Event) -> bool:
    return "method" not in json.loads(event.message)
