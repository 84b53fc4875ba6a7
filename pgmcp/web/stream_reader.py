"""What an exchange reads of its stream, one page after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable
from pgmcp.ports import Log
from pgmcp.types import Cursor, Event, Page
from pgmcp.web.open_streams import OpenStream


class Interrupted(Exception):
    """A large event ends in the middle."""


class StreamReader:
    """The pages of one stream, as long as its reader is the stream's sink.

    Args:
        open_stream: what is heard of the stream.
        sink_epoch: the reader's turn as the stream's sink.
        after: the last event that is known already.
        floor: up to which number nothing is missed: the client named no event.
        patience: seconds for which a page may be read before ``next`` returns without it.
    """

    def __init__(
        self, open_stream: OpenStream, sink_epoch: int, after: int, floor: int, log: Log, clock: Clock, patience: float
    ) -> None:
        self._open_stream, self._sink_epoch, self._log, self._clock = open_stream, sink_epoch, log, clock
        self._patience, self._floor = patience, floor
        self._reading: asyncio.Task[Page] | None = None
        self.after = after
        """The last event that was read."""
        self.carried = after
        """The last event that was written to the client."""

    def cursor(self, after: int) -> Cursor:
        """This reader at a place of the stream."""
        return Cursor(self._open_stream.stream, self._sink_epoch, after, self._floor)

    async def next(self, seconds: float, *, look: bool) -> Page | None:
        """What comes next in the stream; None when nothing does within ``seconds``.

        Args:
            seconds: how long to wait for a wake-up.
            look: read at once, before any wake-up.
        """
        if not look and not await self._clock.wait(self._open_stream.moved, seconds):
            return None
        self._open_stream.moved.clear()
        if self._open_stream.over:
            return Page(attached=False, closed=False)
        page = await self._read()
        if page is None:
            return None
        if page.events:
            self.after = page.events[-1].seq
            if page.more:
                self._open_stream.moved.set()
        return page

    async def _read(self) -> Page | None:
        """Read on; None when the database takes longer than comments may wait. The same read is awaited again then."""
        again = self._reading is not None
        if self._reading is None:
            self._reading = asyncio.create_task(self._log.read(self.cursor(self.after)))
        done, _ = await asyncio.wait({self._reading}, timeout=self._patience)
        if not done:
            return None
        reading, self._reading = self._reading, None
        if again:
            self._open_stream.moved.set()  # what moved while it was read, it may have missed
        try:
            return reading.result()
        except DatabaseUnavailable:
            return None

    async def message(self, event: Event) -> AsyncIterator[bytes]:
        """An event's message, piece by piece.

        Raises:
            Interrupted: the rest cannot be had: this reader is not the sink any more, or it took too long.
        """
        yield event.message
        have = len(event.message)
        while have < event.size:
            try:
                piece = await self._log.read_on(self.cursor(event.seq - 1), have)
            except DatabaseUnavailable as error:
                raise Interrupted from error
            if not piece:
                raise Interrupted
            yield piece
            have += len(piece)

    def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
