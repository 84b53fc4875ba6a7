"""The journal's writer: what an actor writes into its session's journal, one write after the other.

Invariants:
- Each write has a greater number than those before it, and the next one begins when this one has ended or was given up:
  a try that arrives late finds a greater number in its place and changes nothing.
- The numbers of a restored actor begin far beyond those that its predecessor can have used without being heard of.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from pgmcp.errors import DatabaseUnavailable
from pgmcp.ports import Inbox
from pgmcp.session.fenced_writer import FencedWriter
from pgmcp.types import JUMP, Established, JournalEntry

TURN_SECONDS = 25.0
"""Seconds for which a value waits for the writes before it."""


class JournalWriter:
    """The writes of one actor.

    Args:
        version: the number of the newest write that the tables knew when the actor was made; None for a new session.
    """

    def __init__(self, inbox: Inbox, writer: FencedWriter, version: int | None) -> None:
        self._inbox, self._writer = inbox, writer
        self._version = 0 if version is None else version + JUMP
        self._turn = asyncio.Lock()

    async def establish(self, facts: Established) -> None:
        """JournalWriter what the handshake settled, however long that takes.

        Raises:
            PgmcpError: it is refused, or nobody wants it any more.
        """
        await self._insist(lambda version: self._inbox.establish(self._writer.ownership, facts, version))

    async def write(self, entry: JournalEntry) -> None:
        """JournalWriter or forget what establishes the session, however long that takes.

        Raises:
            PgmcpError: it is refused, or nobody wants it any more.
        """
        await self._insist(lambda version: self._inbox.write_journal(self._writer.ownership, entry, version))

    async def keep(self, entry: JournalEntry) -> None:
        """JournalWriter or forget a value, whose sayer can try again.

        Raises:
            DatabaseUnavailable: not in time; it may be stored or not.
            PgmcpError: it is refused.
        """
        async with self._numbered() as version:
            await self._writer.use(lambda: self._inbox.write_journal(self._writer.ownership, entry, version))

    async def _insist(self, write: Callable[[int], Awaitable[None]]) -> None:
        async with self._turn:
            version = self._next()
            await self._writer.insist(lambda: write(version))

    @asynccontextmanager
    async def _numbered(self) -> AsyncIterator[int]:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            message = "What was to be stored before this waits for PostgreSQL; try again."
            raise DatabaseUnavailable(message) from None
        try:
            yield self._next()
        finally:
            self._turn.release()

    def _next(self) -> int:
        self._version += 1
        return self._version
