"""Keeping a node in the cluster: one incarnation after another.

Failure handling: what the cluster has declared dead, or what failed in a way that nobody expected, is followed by a new
incarnation, for as long as the node runs. When several in a row have failed soon after they joined that does not help:
the supervisor goes on trying, and ``failing`` says that the process should be replaced. Neither a database that is away
nor a leaving node is a failure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from pgmcp.clock import Clock
from pgmcp.errors import PgmcpError, SchemaError
from pgmcp.node.incarnation import Incarnation
from pgmcp.service import Faults, Service

logger = logging.getLogger(__name__)

REJOIN_SECONDS = 0.5
"""Seconds between attempts to join again."""

LONGEST_PAUSE_SECONDS = 30.0
"""Seconds that a node stays away at most when it has failed several times in a row."""

STEADY_SECONDS = 60.0
"""Seconds after which an incarnation has lived long enough for those before it not to count any more."""

REASONS = 5
"""Different reasons that are told while the node tries to join again."""

SEVERAL = 3
"""Failures in a row after which beginning anew does not help."""


class Supervisor(Service):
    """What keeps a node in the cluster.

    Args:
        make: makes a new incarnation.
        faults: counts unexpected errors.
        leaving: whether the node leaves, so that no incarnation follows.
    """

    def __init__(self, make: Callable[[], Incarnation], clock: Clock, faults: Faults, leaving: Callable[[], bool]):
        self._make, self._clock, self._faults, self._leaving = make, clock, faults, leaving
        self.present: Incarnation | None = None
        """The present incarnation; None while the node is no part of the cluster."""
        self.absent = "joining"
        """Why there is none."""
        self._failures = 0
        self._joined_at = 0.0
        self._joined_before = False
        self._reasons: set[str] = set()

    async def start(self) -> None:
        """Join for the first time.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached.
            SchemaError: the database needs a newer build.
        """
        incarnation = self._make()
        try:
            await incarnation.start()
        except BaseException:
            await incarnation.stop()
            raise
        self.present, self._joined_at = incarnation, self._clock.boottime()
        if self._joined_before:
            logger.warning("this node joined again, as %s", incarnation.node_id)
        else:
            logger.info("this node joined as %s", incarnation.node_id)
        self._joined_before = True
        self._reasons.clear()

    async def run(self) -> None:
        """Join again whenever an incarnation is over, until the node leaves."""
        while True:
            if (incarnation := self.present) is not None:
                await incarnation.run()
                self._count(failed=incarnation.failed)
                await self.stop()
                await self._pause()
            if self._leaving():
                return
            try:
                await self.start()
            except PgmcpError as error:
                self.absent = "schema" if isinstance(error, SchemaError) else "joining"
                self._complain(error)
                await self._clock.sleep(REJOIN_SECONDS)
            except Exception as error:  # noqa: BLE001 - it is noted
                self._faults.note("joining again", error)
                self._count(failed=True)
                await self._clock.sleep(REJOIN_SECONDS)

    def _complain(self, error: PgmcpError) -> None:
        """Say once why the node cannot join; it tries twice a second."""
        schema = isinstance(error, SchemaError)
        reason = type(error).__name__ if schema else str(error)  # while it is migrated it changes all the time
        if reason in self._reasons or len(self._reasons) >= REASONS:
            return
        self._reasons.add(reason)
        if schema:
            logger.error("this node cannot join again, and goes on trying: %s", error)
        else:
            logger.warning("this node cannot join again yet, and goes on trying: %s", error)

    async def _pause(self) -> None:
        """Give the other nodes time after a failure: whoever joins takes sessions, and three restores end one."""
        if self._failures and not self._leaving():
            await self._clock.sleep(min(REJOIN_SECONDS * 2 ** (self._failures - 1), LONGEST_PAUSE_SECONDS))

    async def stop(self) -> None:
        """Leave the cluster."""
        incarnation, self.present = self.present, None
        if incarnation is not None:
            await incarnation.stop()

    @property
    def failing(self) -> bool:
        """Whether the node fails again and again, so that only a new process may help."""
        return self._failures >= SEVERAL and not self._steady

    @property
    def _steady(self) -> bool:
        return self.present is not None and self._clock.boottime() - self._joined_at >= STEADY_SECONDS

    def _count(self, *, failed: bool) -> None:
        before = 0 if self._steady or not failed else self._failures
        self._failures = before + failed
        if self._failures == SEVERAL:
            logger.error("this node failed %d times in a row soon after it had joined: replace the process", SEVERAL)
