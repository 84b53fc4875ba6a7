"""Fair shares: how many of a node's places one caller may hold.

Invariants:
- Nobody holds more than three quarters of them; while others are about, or were within ``ALONE`` seconds, a quarter,
  and not more than are free. So whoever comes finds room, however many hold as many as they may.
- Who holds nothing yet may have a place as long as there is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pgmcp.clock import Clock
from pgmcp.errors import NodeFull, SessionBusy
from pgmcp.web.admission import Caller, RecentOthers


class FairShares:
    """Places of one kind.

    Args:
        most: how many there are.
        what: what takes one, in the plural.
    """

    def __init__(self, most: int, what: str, clock: Clock) -> None:
        self._most, self._what = most, what
        self._held: Counter[Caller] = Counter()
        self._total = 0
        self._others = RecentOthers(clock)

    @property
    def callers(self) -> int:
        """Those who hold places."""
        return len(self._held)

    @contextmanager
    def held(self, caller: Caller) -> Iterator[None]:
        """Hold a place for as long as the context lasts.

        Raises:
            NodeFull: there is none.
            SessionBusy: the caller holds as many as it may.
        """
        self._others.seen(caller)
        if self._total >= self._most:
            message = f"This node has {self._total} {self._what} open; try again or ask another one."
            raise NodeFull(message)
        own = self._held[caller]  # a Counter remembers nobody by that
        if own and own >= self._share(own):
            message = f"You have {own} {self._what} open, as many as you may at this node now; end one before the next."
            raise SessionBusy(message)
        self._held[caller] += 1
        self._total += 1
        try:
            yield
        finally:
            self._total -= 1
            self._held[caller] -= 1
            if not self._held[caller]:
                del self._held[caller]

    def _share(self, own: int) -> int:
        if own == self._total and not self._others:
            return self._most * 3 // 4
        return min(self._most // 4, self._most - self._total)
