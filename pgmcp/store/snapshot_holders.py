"""Says who holds an old snapshot of the database: as long as it lasts, nothing that is over can be removed.

Invariant: each holder is named once.

Failure handling: it is looked for again at the next sweep. A role that may not see the activity of others sees nobody.
"""

from __future__ import annotations

import logging

from pgmcp.errors import DatabaseUnavailable
from pgmcp.store.database import Database

logger = logging.getLogger(__name__)

OLD_SECONDS = 60.0
"""Seconds after which a transaction's snapshot counts as old."""


class SnapshotHolders:
    """Who holds an old snapshot, as far as this node has said so."""

    def __init__(self, database: Database, old: float = OLD_SECONDS) -> None:
        self._database, self._old = database, old
        self._named: set[tuple[str, str, int]] = set()

    async def look(self) -> None:
        """Name those who are new, and say so when there are none any more."""
        try:
            rows = await self._database.ask("snapshot_holders", self._old)
        except DatabaseUnavailable:
            return
        present = {(row["kind"], row["name"], round(row["since"])): row for row in rows}
        for holder in present.keys() - self._named:
            row = present[holder]
            who = (
                f"application {row['application']!r}, role {row['role']}, {row['state']}"
                if row["state"]
                else row["role"]
            )
            logger.warning(
                "an old snapshot holds the tables: %s %s (%s) began %d s ago. Until it ends PostgreSQL can remove "
                "nothing that is over, and the tables grow. End it if nobody needs it (%s); forgotten ones end by "
                "idle_in_transaction_session_timeout",
                row["kind"],
                row["name"],
                who,
                row["age"],
                f"select pg_terminate_backend({row['name']})" if row["state"] else f"rollback prepared '{row['name']}'",
            )
        if self._named and not present:
            logger.warning("no old snapshot holds the tables any more")
        self._named = set(present)
