r"""The lease: may this node act now?

Invariants (G9):
- Trust runs from the *start* of the last good renewal, by a clock that counts through a suspended machine, and ends
  before the lease does: ``renew + 2 * deadline + margin <= trust < ttl`` (checked in the settings).
- ``trusted`` is computed when it is asked, never by a timer: a process that was frozen knows before it acts.
- Fenced is for good. The node joins again under a new id.
- An observer may declare others dead only while its own renewals have not been interrupted: after an outage every live
  node gets a whole ttl to renew. A failed renewal, one that came too late, a lost line, and database time that moved
  against this node's clock interrupt the run.

States::

    joining --renewed--> trusted --trust over--> suspended --renewed--> trusted
                            \\------ renewal hit no live row ------> fenced

Failure handling: a failed renewal changes nothing by itself; the next one is tried soon, and so it is when the line is
lost: a lost line alone costs no node its life. Suspended, a node starts and stores nothing but keeps its sockets;
``acting`` holds its writers until trust is back.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from enum import StrEnum

from pgmcp.clock import Clock
from pgmcp.cluster.outage import Outage
from pgmcp.errors import DatabaseUnavailable, Fenced
from pgmcp.ports import LeaseTable
from pgmcp.service import Service
from pgmcp.settings import Settings

RETRY_SECONDS = 0.2
"""Seconds after which a renewal that failed is tried again."""

DRIFT_SECONDS = 1.0
"""Seconds by which database time may move against this node's clock between two renewals."""


class LeaseState(StrEnum):
    """What the node may do."""

    JOINING = "joining"
    TRUSTED = "trusted"
    SUSPENDED = "suspended"
    FENCED = "fenced"


class Lease(Service):
    """One incarnation's right to act.

    Args:
        table: the node's row.
        settings: the lease times.
        on_fenced: called once, when the row turns out not to be live any more.
    """

    def __init__(self, table: LeaseTable, settings: Settings, clock: Clock, on_fenced: Callable[[], None]) -> None:
        self._table, self._settings, self._clock, self._on_fenced = table, settings, clock, on_fenced
        self._trusted_until: float | None = None
        self._fenced = False
        self._changed, self._hurry = asyncio.Event(), asyncio.Event()
        self._run_since: float | None = None
        self._interrupted = False
        self._last: tuple[float, float] = (0.0, 0.0)
        self.ticked_at = clock.boottime()
        self._outage = Outage(settings)

    @property
    def schema_gone(self) -> bool:
        """Whether PostgreSQL answers, but the node's tables are not there."""
        return self._outage.schema_gone

    @property
    def state(self) -> LeaseState:
        """The state at this very moment."""
        if self._fenced:
            return LeaseState.FENCED
        if self._trusted_until is None:
            return LeaseState.JOINING
        return LeaseState.TRUSTED if self._clock.boottime() < self._trusted_until else LeaseState.SUSPENDED

    @property
    def trusted(self) -> bool:
        """Whether the node may claim, dispatch, store or write to a socket now."""
        return self.state is LeaseState.TRUSTED

    @property
    def suspended_for(self) -> float:
        """Seconds since trust was over: 0 while it is not, infinite when it never comes back."""
        if self._fenced:
            return math.inf
        if self._trusted_until is None:
            return 0.0
        return max(0.0, self._clock.boottime() - self._trusted_until)

    @property
    def renewed_at(self) -> float:
        """When the last good renewal began, by this node's clock; 0 before any."""
        return self._last[0]

    def database_time(self, moment: float) -> float | None:
        """The database's time at a moment of this node's clock, never earlier than it was; None before any renewal.

        A renewal's answer was given after the renewal began, so it is at most as late as that makes it.
        """
        start, database_time = self._last
        return None if self._trusted_until is None else database_time + moment - start

    async def start(self) -> None:
        """Renew for the first time.

        Raises:
            DatabaseUnavailable: it failed.
        """
        await self.renew()

    async def renew(self) -> None:
        """Try one renewal.

        Raises:
            DatabaseUnavailable: it failed; trust runs on from the last good one.
        """
        start = self._clock.boottime()
        if self._fenced:
            return
        try:
            database_time = await self._table.renew()
        except DatabaseUnavailable as error:
            self.interrupt()
            self._outage.failed(error, self.suspended_for)
            raise
        if database_time is None:
            self.fence()
            return
        self._outage.renewed(self.suspended_for)
        self._trusted_until = start + self._settings.trust
        self._continue_run(start, database_time)
        self._announce()

    def _continue_run(self, start: float, database_time: float) -> None:
        before, database_before = self._last
        passed = start - before
        if self._run_since is not None and (
            passed > self._settings.renew + 2 * self._settings.deadline
            or abs(database_time - database_before - passed) > DRIFT_SECONDS + self._settings.deadline
        ):
            self.interrupt()
        if self._run_since is None:
            self._run_since = start
        self._last = (start, database_time)

    def interrupt(self) -> None:
        """Begin the run of good renewals anew, for it cannot be trusted to have had no break."""
        self._interrupted = self._interrupted or self._run_since is not None
        self._run_since = None

    def hurry(self) -> None:
        """The line was lost: renew at once."""
        self.interrupt()
        self._hurry.set()

    def may_condemn(self) -> tuple[bool, bool]:
        """Whether this node may declare others dead now: those whose lease ran out, and those that are silent."""
        if self._run_since is None or not self.trusted:
            return False, False
        run = self._clock.boottime() - self._run_since
        return run >= self._settings.ttl, run >= (self._settings.ttl if self._interrupted else self._settings.silence)

    def fence(self) -> None:
        """End this incarnation's right to act, for good."""
        if not self._fenced:
            self._fenced = True
            self._announce()
            self._on_fenced()

    async def acting(self) -> None:
        """Return when the node is trusted.

        Raises:
            Fenced: it never will be again.
        """
        while not self.trusted:
            if self._fenced:
                message = "This node's stay in the cluster is over; it joins again under a new id."
                raise Fenced(message)
            await self._clock.wait(self._changed, self._settings.renew)

    async def trusted_within(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for trust; whether the node has it, or False at once when it is fenced."""
        if not self.trusted and not self._fenced:
            await self._clock.wait(self._changed, seconds)
        return self.trusted

    async def run(self) -> None:
        """Renew for ever; ends when the node is fenced."""
        pause = self._settings.renew
        while not self._fenced:
            await self._clock.wait(self._hurry, pause)
            self._hurry.clear()
            self.ticked_at = self._clock.boottime()
            try:
                await self.renew()
                pause = self._settings.renew
            except DatabaseUnavailable:
                pause = min(RETRY_SECONDS, self._settings.renew)

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
