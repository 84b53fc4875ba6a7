"""Trouble that comes again and again, told once.

Invariants:
- Each reason is told once, and the end of all of it once. Both are warnings, so that who reads only those reads both.
- That PostgreSQL is away, the lease tells for the whole node (``cluster.outage``). Whoever cannot work because of it
  says so only when it has lasted longer than an outage that nobody has noticed otherwise.
"""

from __future__ import annotations

import logging

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, told

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0
"""Seconds after which work that does not get through to PostgreSQL is told of, though the node is trusted."""

MOST = 20
"""Different reasons that are told of one trouble."""


class Trouble:
    """What the log says of one piece of work that fails again and again.

    Args:
        what: the work, for the log.
        patience: seconds for which it may fail to get through to PostgreSQL.
    """

    def __init__(self, what: str, clock: Clock, patience: float = PATIENCE_SECONDS) -> None:
        self._what, self._clock, self._patience = what, clock, patience
        self._since: float | None = None
        self._told: set[str] = set()

    def met(self, error: BaseException) -> None:
        """It failed, and will be tried again."""
        now = self._clock.boottime()
        self._since = now if self._since is None else self._since
        reason = told(error)
        early = isinstance(error, DatabaseUnavailable) and now - self._since < self._patience
        if early or reason in self._told or len(self._told) >= MOST:
            logger.debug("%s failed and is tried again: %s", self._what, reason)
        else:
            self._told.add(reason)
            logger.warning("%s fails, and is tried again and again: %s", self._what, reason)

    def paused(self) -> None:
        """It is not tried for now: how long it has failed begins anew."""
        self._since = None

    def over(self) -> None:
        """It has worked."""
        if self._told:
            logger.warning("%s works again", self._what)
        self._since = None
        self._told.clear()
