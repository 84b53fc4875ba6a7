"""Ids of requests that are kept for a while; the oldest gives way when there are too many."""

from __future__ import annotations

from pgmcp.clock import Clock

KEPT_SECONDS = 30.0
"""Seconds for which an id is kept."""

REMEMBERED = 256
"""Ids that are kept at most."""


class RecentIds:
    """A memory for ids."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def keep(self, rpc_id: str) -> None:
        """Keep an id from now on."""
        self._until.pop(rpc_id, None)
        if len(self._until) >= REMEMBERED:
            del self._until[next(iter(self._until))]
        self._until[rpc_id] = self._clock.boottime() + KEPT_SECONDS

    def __contains__(self, rpc_id: str) -> bool:
        return self._clock.boottime() < self._until.get(rpc_id, 0.0)

    def take(self, rpc_id: str) -> bool:
        """Forget an id; whether it was kept."""
        return self._clock.boottime() < self._until.pop(rpc_id, 0.0)
