"""How much may be heard on one channel: PostgreSQL has no rights on channels, so anybody may say much there."""

from __future__ import annotations

from pgmcp.clock import Clock

WINDOW_SECONDS = 0.05
"""Seconds for which one allowance is meant."""

FLOOD = 4
"""Times as much as one window allows that is a flood when it comes beyond that; a quieter window takes one back."""

QUIET_SECONDS = 1.0
"""Seconds with nothing to read after which there was no flood."""


class Allowance:
    """So many payloads and so much text in each window; what is more is not to be read.

    Args:
        payloads: how many, in one window.
        characters: their length in all, in one window.
    """

    def __init__(self, clock: Clock, payloads: int, characters: int) -> None:
        self._clock, self._payloads, self._characters = clock, payloads, characters
        self.dropped = 0
        """Payloads that were not read, ever."""
        self.calm()

    def calm(self) -> None:
        """Forget that there was a flood."""
        self._began, self._count, self._length, self._excess = float("-inf"), 0, 0, 0.0

    @property
    def flooded(self) -> bool:
        """Whether it is a flood."""
        return self._excess >= FLOOD

    def take(self, payload: str) -> bool:
        """Whether a payload is to be read."""
        now = self._clock.boottime()
        if now - self._began >= WINDOW_SECONDS:
            if now - self._began >= QUIET_SECONDS:
                self._excess = 0.0
            elif self._within():
                self._excess = max(0.0, self._excess - 1)
            self._began, self._count, self._length = now, 0, 0
        self._count += 1
        self._length += len(payload)
        if self._within():
            return True
        self.dropped += 1
        self._excess += 1 / self._payloads + len(payload) / self._characters
        return False

    def _within(self) -> bool:
        return self._count <= self._payloads and self._length <= self._characters
