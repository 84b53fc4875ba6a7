"""The answers of one stream as one JSON body."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence

from pgmcp.errors import NodeNotReady, PgmcpError, SessionUnknown
from pgmcp.types import Event
from pgmcp.web.connection import PIECE_BYTES
from pgmcp.web.json_rpc import Refusal
from pgmcp.web.open_streams import OpenStream
from pgmcp.web.response_writer import ResponseWriter
from pgmcp.web.stream_reader import Interrupted, StreamReader
from pgmcp.web.token_expiry import TokenExpiry, expired

_FIRST_KEY = re.compile(rb'\s*\{(?:\s*"(?:jsonrpc|id)"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[^\s",{}]+)\s*,)*\s*"(\w+)"\s*:')


class JsonResponse:
    """Collects a stream's answers and writes them.

    Args:
        open_stream: what is heard of the stream.
        poll: seconds between two looks without a wake-up.
        expiry: of the token that opened the exchange.
        lost: what to answer when the stream turns out not to be there any more.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        reader: StreamReader,
        writer: ResponseWriter,
        *,
        poll: float,
        expiry: TokenExpiry,
        lost: Callable[[], Awaitable[Sequence[bytes]]],
    ) -> None:
        self._open_stream, self._reader, self._writer = open_stream, reader, writer
        self._poll, self._expiry, self._lost = poll, expiry, lost

    async def collect(self) -> Sequence[Event]:
        """Wait for the stream's answers; none when the client has left.

        Raises:
            SessionUnknown: the session ended before the answer was there.
            NodeNotReady: this node leaves; the same request, sent again, gets the answer on another one.
            Refusal: another exchange carries the stream now, or the token has expired.
        """
        answers: list[Event] = []
        with self._writer.watching():
            while not self._writer.gone:
                if self._expiry.passed:
                    raise expired()
                page = await self._reader.next(self._expiry.within(self._poll), look=False)
                if page is None:
                    self._open_stream.moved.set()
                    continue
                answers += [event for event in page.events if is_answer(event)]
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

    async def send(self, answers: Sequence[Event], *, batch: bool) -> None:
        """Send answers as one JSON body."""
        if self._writer.gone or not answers:
            return
        await self._writer.acting()
        around = (b"[", b",", b"]") if batch else (b"", b"", b"")
        length = sum(event.size for event in answers) + (len(answers) + 1 if batch else 0)
        await self._writer.start(200, {"content-type": "application/json", "content-length": str(length)})
        if await self._put(answers, *around):
            self._reader.carried = self._reader.after

    async def _put(self, answers: Sequence[Event], start: bytes, between: bytes, end: bytes) -> bool:
        """Write answers one after the other; whether all of it was written."""
        held = start  # what is written with what follows, for the last piece has to say that it is the last
        try:
            for number, event in enumerate(answers):
                held += between if number else b""
                async for piece in self._reader.message(event):
                    if len(held) + len(piece) > PIECE_BYTES:
                        if held and not await self._writer.put(held, inside=True):
                            return False
                        held = b""
                    held += piece
        except Interrupted:
            self._writer.abort()
            return False
        return await self._writer.put(held + end, inside=True, more=False)

    async def whole(self, event: Event) -> bytes:
        """The message of an event, however large.

        Raises:
            SessionUnknown: as in ``collect``.
            NodeNotReady: as in ``collect``.
            Refusal: as in ``collect``.
        """
        try:
            return b"".join([piece async for piece in self._reader.message(event)])
        except Interrupted:
            raise self._why_over() from None


def is_answer(event: Event) -> bool:
    """Whether an event is an answer; said by the first key that is neither ``jsonrpc`` nor ``id``."""
    found = _FIRST_KEY.match(event.message)
    if found is None and not event.rest:
        return "method" not in json.loads(event.message)
    return found is None or found[1] in {b"result", b"error"}
