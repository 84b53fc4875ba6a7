"""The publication reader: reads what was published anywhere, and tells it to this node's listeners.

Invariants:
- Each publication is told once, in the order in which they were stored; the next look begins when the last one's
  publications were told.
- After a gap everything that anybody here wants to hear of is told once: a needless look at a list harms nobody, and
  silence does. A gap is another timeline or a crash of PostgreSQL (the horizon names transactions by ids that may have
  been given out anew), an absence of half as long as publications are kept, or more publications than one look lists. A
  lost line is none: the horizon is exact.

Failure handling: a look that fails is made again by the next wake-up or poll, from the same horizon.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence

from pgmcp.clock import Clock
from pgmcp.errors import PgmcpError
from pgmcp.ports import Publications
from pgmcp.service import Faults, OnDemand, Service
from pgmcp.types import LISTS, PUBLICATIONS_SECONDS, Change, Horizon, Publication

ABSENT_SECONDS = PUBLICATIONS_SECONDS / 2
"""Seconds without a look after which publications may have been missed."""

PAUSE_SECONDS = 0.02
"""Seconds between two looks, at least."""


class PublicationReader(Service):
    """One incarnation's reader of publications.

    Args:
        table: where they are.
        on_publications: takes publications, each once.
        on_gap: called after a gap, with the lists of which changes may have been missed.
        faults: counts the times that a listener broke it.
    """

    def __init__(
        self,
        table: Publications,
        clock: Clock,
        *,
        on_publications: Callable[[Sequence[Publication]], Awaitable[None]],
        on_gap: Callable[[Collection[Change]], Awaitable[None]],
        faults: Faults,
    ) -> None:
        self._faults = faults
        self._table, self._clock, self._on_publications, self._on_gap = table, clock, on_publications, on_gap
        self._horizon: Horizon | None = None
        self._looked_at = 0.0
        self._gap = False
        self._looks = OnDemand(self._look_or_note, clock, PAUSE_SECONDS)

    async def start(self) -> None:
        """Look for the first time: from now on publications are told.

        Raises:
            DatabaseUnavailable: not now.
        """
        await self._look()

    async def poll(self) -> None:
        """Look without a wake-up: whoever published may have died before it woke anybody."""
        self.look()

    def look(self, *, gap: bool = False) -> None:
        """Look soon, unless that is being done; then once more.

        Args:
            gap: publications may have been missed.
        """
        if self._horizon is not None:
            self._gap = self._gap or gap
            self._looks.want()

    async def run(self) -> None:
        """Look whenever that is wanted, for ever."""
        await self._looks.run()

    async def _look_or_note(self) -> None:
        try:
            await self._look()
        except PgmcpError:
            raise
        except Exception as error:  # noqa: BLE001 - it is noted, and made up for by the next look
            self._faults.note("telling publications", error)
            self._gap = True

    async def _look(self) -> None:
        now = self._clock.boottime()
        since = None if self._gap or now - self._looked_at > ABSENT_SECONDS else self._horizon
        self._gap = False
        try:
            batch = await self._table.read(since)
        except BaseException:
            self._gap = self._gap or since is None
            raise
        self._horizon, self._looked_at = batch.horizon, now
        if since is None or batch.more:
            await self._on_gap(LISTS if batch.more else LISTS & {each.change for each in batch.publications})
        else:
            await self._on_publications(batch.publications)
