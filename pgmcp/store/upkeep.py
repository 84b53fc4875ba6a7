"""Expiry and retention: what is over goes, in small batches, on whichever node gets to it.

Failure handling: rows that somebody works with are skipped and come up again; a sweep that fails is tried again at the
next turn.
"""

from __future__ import annotations

from pgmcp.store.database import Database
from pgmcp.types import SessionKey

EVERY = 30.0
"""Seconds between the sweeps of one node."""

SSE_GONE = 60.0
"""Seconds for which an HTTP+SSE session waits for its client to come back."""

ROUNDS = 20
"""Batches of one kind that a sweep takes at most."""


class Upkeep:
    """The sweeps of one node."""

    def __init__(self, database: Database) -> None:
        self._database, self._settings = database, database.settings

    async def expire(self) -> list[SessionKey]:
        """End sessions that are idle or too old.

        Returns:
            those that were ended, for their exchanges to be told.
        """
        settings = self._settings
        rows = await self._database.ask("expire_sessions", settings.idle_timeout, settings.max_age, SSE_GONE)
        return [SessionKey(row["id"]) for row in rows]

    async def prune(self) -> None:
        """Remove finished streams, messages and delivered events that are older than the retention, and old nodes."""
        for name in ("prune_streams", "prune_messages", "prune_standalone"):
            for _ in range(ROUNDS):
                if not await self._database.ask(name, self._settings.retention):
                    break
        for name in ("drop_dead_sinks", "prune_nodes", "prune_takeovers", "prune_states"):
            await self._database.ask(name)
