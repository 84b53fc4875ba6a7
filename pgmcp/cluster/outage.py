"""What the log says of an outage: once that, why, what it means, and when it is over.

A node that loses PostgreSQL is trusted for some seconds more; an outage that is shorter has cost nothing, and only the
line says that it was lost. All of it is warnings and errors: whoever reads only those reads of the end, too.
"""

from __future__ import annotations

import logging

from pgmcp.errors import DatabaseUnavailable, SchemaError
from pgmcp.settings import Settings

logger = logging.getLogger(__name__)

MOST = 10
"""Different reasons that are told of one outage: a database that is coming back refuses in several ways."""


class Outage:
    """The present outage of one incarnation, if there is one."""

    def __init__(self, settings: Settings) -> None:
        self._trust, self._hold = settings.trust, settings.hold
        self._reasons: set[str] = set()
        self._suspended = self._unready = False
        self.schema_gone = False
        """Whether PostgreSQL answers, but the node's tables are not there."""

    def failed(self, error: DatabaseUnavailable, suspended_for: float) -> None:
        """A renewal failed.

        Args:
            suspended_for: seconds since the node's trust was over; 0 while it is not.
        """
        reason = str(error)
        self.schema_gone = isinstance(error, SchemaError)
        if self.schema_gone and self._new(reason):
            logger.error("the schema is gone, and this node can do nothing without it: %s", reason)
        if suspended_for > 0 and not self._suspended:
            self._suspended = True
            self._new(reason)
            logger.warning(
                "suspended: PostgreSQL was not reached for %g s. Nothing is begun and nothing stored until it is; "
                "requests wait, connections stay. %s",
                self._trust,
                reason,
            )
        elif self._suspended and self._new(reason):
            logger.warning("still suspended: %s", reason)
        if suspended_for >= self._hold and not self._unready:
            self._unready = True
            logger.warning("not ready: suspended for %g s (--hold); /readyz and waiting requests get 503", self._hold)

    def _new(self, reason: str) -> bool:
        if reason in self._reasons or len(self._reasons) >= MOST:
            return False
        self._reasons.add(reason)
        return True

    def renewed(self, suspended_for: float) -> None:
        """A renewal got through.

        Args:
            suspended_for: seconds for which the node was not trusted before.
        """
        if self._suspended:
            ready = ", and ready again" if self._unready else ""
            logger.warning("trusted again%s: PostgreSQL is back after %.1f s in suspense", ready, suspended_for)
        elif self.schema_gone:
            logger.warning("the schema is there again")
        self._reasons.clear()
        self._suspended = self._unready = self.schema_gone = False
