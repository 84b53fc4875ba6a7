"""Appending what an actor says to the log: from the moment an event has its number, the actor owns it, not who said it.

Invariants:
- An event with a number is stored, or refused by the database: its sayer may give up, the event may not. A gap would
  make everything after it unfit for its stream.
- At most ``EVENTS`` events and ``BYTES`` bytes of a session wait for the database. Whoever says more waits before his
  event has a number, and may give up there. Answers do not wait: there is one for each request in flight at most.

Failure handling: a refusal is reported once, to ``refused``, which mutes the actor. When a term begins, an event may
overtake those before it, which get their numbers anew: it waits for them and is sent once more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import takewhile

from pgmcp.errors import OutOfStep, PgmcpError
from pgmcp.ports import Log
from pgmcp.session.fenced_writer import FencedWriter
from pgmcp.session.outbox import Outbox, PendingEvent
from pgmcp.session.running_requests import Stream
from pgmcp.types import Entry, NodeId, Outcome, RequestKey, StreamId

logger = logging.getLogger(__name__)

EVENTS = 256
"""Events of one session that may wait to be stored."""

BYTES = 4 * 1024 * 1024
"""Bytes of one session after which no further event begins to wait to be stored."""


class EventAppender:
    """Stores the events of one actor.

    Args:
        outbox: gives the numbers.
        wake_sink: called with sink and stream after an event was stored.
        refused: called when the database refuses an event.
    """

    def __init__(
        self,
        outbox: Outbox,
        writer: FencedWriter,
        log: Log,
        wake_sink: Callable[[NodeId, StreamId], None],
        refused: Callable[[PgmcpError], None],
    ) -> None:
        self._outbox, self._writer, self._log = outbox, writer, log
        self._wake_sink, self._refused = wake_sink, refused
        self._tasks: dict[asyncio.Task[None], PendingEvent] = {}
        self._turn, self._less = asyncio.Lock(), asyncio.Event()

    async def room(self) -> None:
        """Wait until another event may wait to be stored; whoever asks first gets on first."""
        async with self._turn:
            while self._writer.wanted and self._full():
                self._less.clear()
                await self._less.wait()

    def _full(self) -> bool:
        events, size = self._outbox.waiting
        return events >= EVENTS or size >= BYTES

    def store(
        self,
        stream: Stream,
        message: bytes,
        finishes: RequestKey | None = None,
        outcome: Outcome | None = None,
        topic: str | None = None,
    ) -> asyncio.Task[None]:
        """Give an event its number and store it; done when it is stored, or never will be."""
        pending = self._outbox.begin(stream, message, finishes, outcome, topic)
        task = asyncio.create_task(self._store(pending))
        self._tasks[task] = pending
        task.add_done_callback(self._tasks.pop)
        return task

    async def _store(self, pending: PendingEvent) -> None:
        stored = False
        try:
            sink = await self._writer.insist(lambda: self._in_turn(pending))
            stored = True
        except PgmcpError as error:
            self._refused(error)
            return
        finally:
            self._outbox.end(pending, stored=stored)
            self._less.set()
        if sink is not None:
            self._wake_sink(sink, pending.stream.id)

    async def _in_turn(self, pending: PendingEvent) -> NodeId | None:
        try:
            return await self._append(pending)
        except OutOfStep:
            before = takewhile(lambda each: each[1] is not pending, self._tasks.items())
            if waiting := [task for task, each in before if each.stream is pending.stream]:
                await asyncio.wait(waiting)
            return await self._append(pending)

    async def _append(self, pending: PendingEvent) -> NodeId | None:
        if pending.stored:
            return None
        what = (pending.message, pending.finishes, pending.outcome, pending.topic)
        return await self._log.append(Entry(self._writer.ownership, pending.stream.id, pending.seq, *what))

    def stop(self) -> None:
        """Nobody says anything any more: let go who waits for room."""
        self._less.set()

    async def settled(self) -> None:
        """Wait until nothing of this actor is on its way to the database."""
        while self._tasks:
            await asyncio.wait(self._tasks)
