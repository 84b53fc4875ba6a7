"""One HTTP exchange that carries one stream to its client: as server-sent events, or its answers as plain JSON.

Invariants:
- Nothing is written that is not in the log, and nothing twice (``SseResponse``), and nothing but comments without trust
  (``ResponseWriter``).
- A disconnect of the client ends the exchange and nothing else: the request runs on (disconnecting is not cancelling,
  2025-11-25 "Sending Messages to the Server" 6). So does a client that does not read (``Connection``).

Failure handling: while the database is away reads wait. A stream that has a newer sink, or whose session is over, ends
the exchange.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from pgmcp.clock import Clock
from pgmcp.cluster.lease import Lease
from pgmcp.errors import PgmcpError
from pgmcp.ports import Log
from pgmcp.protocol import INTERNAL_ERROR
from pgmcp.settings import Settings
from pgmcp.types import Event, Page, StreamKind
from pgmcp.web.connection import Connection
from pgmcp.web.json_response import JsonResponse, is_answer
from pgmcp.web.json_rpc import Refusal
from pgmcp.web.open_streams import OpenStream
from pgmcp.web.response_writer import ResponseWriter
from pgmcp.web.sse_response import SseResponse
from pgmcp.web.stream_reader import StreamReader
from pgmcp.web.token_expiry import TokenExpiry

AUTO_WAIT_SECONDS = 0.1
"""Seconds for which an automatic answer waits for plain JSON to be enough."""

RELEASE_SECONDS = 1.0
"""Seconds that letting go of a stream may take when the exchange is over anyway."""


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
        self._kind, self._log = kind, log
        poll = settings.poll if kind is StreamKind.REQUEST else settings.idle_poll
        self._reader = StreamReader(
            open_stream, sink_epoch, after, floor, log, clock, min(settings.poll, settings.keepalive)
        )
        self._writer = ResponseWriter(
            open_stream,
            lease=lease,
            settings=settings,
            clock=clock,
            connection=connection,
            expiry=expiry,
            headers=headers,
        )
        self._json = JsonResponse(open_stream, self._reader, self._writer, poll=poll, expiry=expiry, lost=lost)
        self._sse = SseResponse(
            open_stream,
            self._reader,
            self._writer,
            kind=kind,
            log=log,
            settings=settings,
            clock=clock,
            poll=poll,
            priming=priming,
            notes_all=notes_all,
            expiry=expiry,
            lost=lost,
        )

    async def handshake(self) -> Page:
        """Wait for the answer to ``initialize``.

        Raises:
            Refusal: the server refused it, or ended before it answered.
        """
        answers = await self._json.collect()
        if not answers:
            raise Refusal(503, "The server ended before it answered initialize; look at its log.", INTERNAL_ERROR)
        error = json.loads(await self._json.whole(answers[0])).get("error")
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
        await self._json.send(await self._json.collect(), batch=batch)

    async def answer_auto(self, *, batch: bool) -> None:
        """Send plain JSON if that is soon enough and all there is, else server-sent events."""
        first = await self._reader.next(AUTO_WAIT_SECONDS, look=False)
        if first is not None and first.closed and all(is_answer(event) for event in first.events):
            await self._json.send(first.events, batch=batch)
        else:
            await self.stream(first=first)

    async def send_json(self, answers: Sequence[Event], *, batch: bool) -> None:
        """Send answers as one JSON body."""
        await self._json.send(answers, batch=batch)

    async def stream(self, *, first: Page | None = None, look: bool = False, preface: bytes = b"") -> None:
        """Carry the stream as server-sent events until it ends, or this exchange does.

        Args:
            preface: what stands before the first event.
            first: what was read already.
            look: read at once: the stream may have events that nobody announces any more.
        """
        await self._sse.stream(first=first, look=look, preface=preface)

    async def release(self) -> None:
        """Let go of the stream: note how far it was carried."""
        self._reader.close()
        carried = 0 if self._writer.gone and self._kind is StreamKind.REQUEST else self._reader.carried
        with suppress(PgmcpError, TimeoutError):
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._log.release(self._reader.cursor(carried))
