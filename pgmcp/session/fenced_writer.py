"""The right under which an actor writes: an ownership, which gets another epoch when the database begins a term."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, Fenced
from pgmcp.types import Ownership

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRY_SECONDS = 1.0
"""Seconds after which a write that ran out of patience is tried again."""


class FencedWriter:
    """One actor's right to write.

    Args:
        ownership: what is written is fenced by it.
        wanted: whether anybody still wants what is written.
    """

    def __init__(self, ownership: Ownership, clock: Clock, wanted: Callable[[], bool]) -> None:
        self.ownership = ownership
        self._clock, self._wanted = clock, wanted

    @property
    def wanted(self) -> bool:
        """Whether anybody still wants what is written."""
        return self._wanted()

    async def use(self, write: Callable[[], Awaitable[Result]]) -> Result:
        """Write once; once more where a refusal only means that a term has begun.

        Raises:
            Fenced: the ownership is over.
            DatabaseUnavailable: not in time.
        """
        while True:
            ownership = self.ownership
            try:
                return await write()
            except Fenced:
                if not self._wanted() or self.ownership == ownership:
                    raise

    async def insist(self, write: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat a write until the database takes or refuses it, or nobody wants it any more.

        Raises:
            PgmcpError: it is refused, or nobody wants it any more.
        """
        while True:
            try:
                return await self.use(write)
            except DatabaseUnavailable as error:
                if not self._wanted():
                    raise
                logger.debug("a write waits for PostgreSQL: %s", error)  # of how many nobody knows: the lease tells
                await self._clock.sleep(RETRY_SECONDS)
