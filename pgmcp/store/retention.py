"""Expiry and retention: what is over goes, in small batches, on whichever node gets to it. There is no leader.

Invariants:
- Nobody waits for a sweep: rows that somebody works with, another node's sweep too, are skipped and come up again.
- A batch is bounded in rows, and by the deadline of any statement; a duty is bounded by ``TURN_SECONDS``.
- What an attached reader has not got yet stays.
- What was accepted, or carried, before a sweep has locked its session keeps the session.

Failure handling: each duty stands for itself. One whose batch fails (because it takes longer than its deadline, most of
all) goes on with half of it at the next sweep; after ``FAILURES`` in a row it pauses, twice as long each time up to
``LONGEST_PAUSE_SECONDS``, and says so once. The first batch that succeeds ends the pauses; the batches grow back
slowly.
"""

from __future__ import annotations

import logging
from collections import deque

import asyncpg

from pgmcp.clock import Ids
from pgmcp.errors import DatabaseUnavailable
from pgmcp.store.database import Database
from pgmcp.store.snapshot_holders import SnapshotHolders
from pgmcp.types import PUBLICATIONS_SECONDS, SessionKey

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
"""Seconds between the sweeps of one node, at most."""

CLIENT_GONE_SECONDS = 60.0
"""Seconds for which a session waits for its client: to come back (HTTP+SSE), or to end the handshake."""

BATCH_ROWS = 500
"""Rows that a statement takes at most."""

SESSIONS = 100
"""Sessions that a statement ends at most: much goes with each of them."""

TURN_SECONDS = 15.0
"""Seconds after which a duty leaves the rest to the next sweep."""

BREATH_SECONDS = 0.05
"""Seconds between two batches, at most."""

FAILURES = 3
"""Failures in a row after which a duty pauses."""

PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 60.0, 1800.0
"""Seconds of the first pause, and of the longest."""

BOTTOM_SECONDS, OVERLAP_SECONDS, REVISIT = 3e9, 5.0, 10
"""Seconds before which nothing was; by which a sweep begins before the end of the last one; and after how many sweeps
one looks for what others had locked or still read."""

GROWTH = 20
"""Batches in a row that have to succeed before they become larger."""


class Breaker:
    """How large the batches of one duty may be, and whether it has to pause."""

    def __init__(self, most: int) -> None:
        self.size, self._most = most, most
        self._failures = self._good = 0
        self._until = 0.0

    def closed(self, now: float) -> bool:
        """Whether the duty may be tried."""
        return now >= self._until

    def failed(self, now: float) -> float | None:
        """A batch failed; the seconds of the first pause, when that begins now."""
        self._failures, self._good = self._failures + 1, 0
        self.size = max(1, self.size // 2)
        pauses = self._failures - FAILURES
        if pauses < 0:
            return None
        pause = min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2**pauses)
        self._until = now + pause
        return None if pauses else pause

    def succeeded(self) -> bool:
        """A batch went through; whether that ends the pauses."""
        paused = self._failures >= FAILURES
        self._failures, self._good = 0, self._good + 1
        if self._good >= GROWTH:
            self.size, self._good = min(self._most, 2 * self.size), 0
        return paused


class Retention:
    """The sweeps of one node."""

    def __init__(self, database: Database, ids: Ids) -> None:
        self._database, self._settings, self._clock, self._ids = database, database.settings, database.clock, ids
        self._snapshot_holders = SnapshotHolders(database)
        self._swept: dict[str, tuple[int, float]] = {}
        self._left: set[str] = set()
        self.breakers: dict[str, Breaker] = {}
        self._horizons: deque[tuple[float, str]] = deque()

    async def expire(self) -> list[SessionKey]:
        """End sessions that are idle or too old.

        Returns:
            those that were ended, for their exchanges to be told.
        """
        settings = self._settings
        times = (settings.idle_timeout, settings.max_age, CLIENT_GONE_SECONDS)
        late = settings.use_precision
        return [SessionKey(row["id"]) for row in await self._clear("expire_sessions", *times, late, most=SESSIONS)]

    async def prune(self) -> None:
        """Remove finished streams, messages and delivered events that are older than the retention, and old nodes."""
        await self._snapshot_holders.look()
        await self._clear("drop_dead_sinks")
        for name in ("prune_streams", "prune_long_streams", "prune_messages"):
            await self._clear_since(name)
        await self._clear("prune_standalone", self._settings.retention)
        for name in ("prune_nodes", "prune_takeovers", "prune_states"):
            await self._clear(name)
        await self._clear("prune_publications", PUBLICATIONS_SECONDS, self._old_horizon())
        now, row = self._clock.boottime(), (await self._database.ask("horizon"))[0]
        self._horizons.append((now, row["horizon"]))

    def _old_horizon(self) -> str | None:
        """The newest snapshot that is older than publications are kept; None while this node has none so old."""
        old, horizon = self._clock.boottime() - PUBLICATIONS_SECONDS, None
        while self._horizons and self._horizons[0][0] <= old:
            horizon = self._horizons.popleft()
        if horizon is None:
            return None
        self._horizons.appendleft(horizon)
        return horizon[1]

    async def _clear_since(self, name: str) -> None:
        """Clear what has become older than the retention since a sweep left nothing; now and then, all of it."""
        start, retention = self._clock.boottime(), self._settings.retention
        sweeps, until = self._swept.get(name, (0, 0.0))
        oldest = BOTTOM_SECONDS if sweeps % REVISIT == 0 else start - until + retention + OVERLAP_SECONDS
        await self._clear(name, retention, oldest)
        if name not in self._left:
            self._swept[name] = sweeps + 1, start
        elif until:  # it goes on from there, not from the bottom again
            self._swept[name] = sweeps + (sweeps % REVISIT == 0), until

    async def _clear(self, name: str, *args: float | str | None, most: int = BATCH_ROWS) -> list[asyncpg.Record]:
        """Repeat a duty's statement until nothing is left, its turn is over or it fails; the rows that it returned."""
        breaker = self.breakers.setdefault(name, Breaker(most))
        cleared: list[asyncpg.Record] = []
        self._left.add(name)
        start = self._clock.boottime()
        while breaker.closed(now := self._clock.boottime()):
            size = breaker.size
            try:
                rows = await self._database.ask(name, *args, size)
            except DatabaseUnavailable as error:
                if pause := breaker.failed(now):
                    logger.warning("%s failed %d times and pauses for %g s or more: %s", name, FAILURES, pause, error)
                break
            if breaker.succeeded():
                logger.warning("%s works again", name)
            cleared += rows
            if len(rows) < size:
                self._left.discard(name)
                break
            if self._clock.boottime() >= start + TURN_SECONDS:
                break
            await self._clock.sleep(self._ids.jitter(BREATH_SECONDS))
        return cleared
