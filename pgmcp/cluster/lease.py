r"""The lease: may this node act now?

Invariants (G9):
- Trust runs from the *start* of the last good renewal, by a clock that counts through a suspended machine, and ends
  before the lease does: ``renew + 2 * deadline + margin <= trust < ttl`` (checked in the settings).
- ``trusted`` is computed when it is asked, never by a timer: a process that was frozen knows before it acts.
- Fenced is for good. The node joins again under a new id.

States::

    joining --renewed--> trusted --trust over--> suspended --renewed--> trusted
                            \\------ renewal hit no live row ------> fenced

Failure handling: a failed renewal changes nothing by itself; the next one is tried after ``renew`` seconds. Suspended,
a node starts and stores nothing but keeps its sockets; ``acting`` holds its writers until trust is back.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from enum import StrEnum

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, Fenced
from pgmcp.ports import LeaseTable
from pgmcp.settings import Settings


class LeaseState(StrEnum):
    """What the node may do."""

    JOINING = "joining"
    TRUSTED = "trusted"
    SUSPENDED = "suspended"
    FENCED = "fenced"


class Lease:
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
        self._changed = asyncio.Event()
        self.ticked_at = clock.boottime()

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

    async def renew(self) -> None:
        """Try one renewal.

        Raises:
            DatabaseUnavailable: it failed; trust runs on from the last good one.
        """
        start = self._clock.boottime()
        if self._fenced:
            return
        if await self._table.renew():
            self._trusted_until = start + self._settings.trust
            self._announce()
        else:
            self.fence()

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
                message = "This node was declared dead; it joins again under a new id."
                raise Fenced(message)
            await self._clock.wait(self._changed, self._settings.renew)

    async def trusted_within(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for trust; whether the node has it, or False at once when it is fenced."""
        if not self.trusted and not self._fenced:
            await self._clock.wait(self._changed, seconds)
        return self.trusted

    async def run(self) -> None:
        """Renew for ever; ends when the node is fenced."""
        while not self._fenced:
            await self._clock.sleep(self._settings.renew)
            self.ticked_at = self._clock.boottime()
            try:
                await self.renew()
            except DatabaseUnavailable:
                continue

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
