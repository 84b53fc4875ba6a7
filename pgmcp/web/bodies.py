"""The bodies that a node has read, and has neither stored nor answered yet: their bytes are bounded.

Invariants:
- All of them together have no more than ``SHARES`` times the largest body's bytes, those of one caller a quarter of
  that. Small ones have a quarter more for themselves, so that a node full of large ones still takes calls.
- What has been said to be too much is not read.
- What was stored, or answered, counts no longer: whoever has done that lets go of it (``Body.drop``).
- A large one that is refused keeps its room for ``REFUSED_SECONDS``, and is answered only then: who sends what costs a
  node time is read no faster than that, over however many connections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pgmcp.clock import Clock
from pgmcp.errors import NodeFull
from pgmcp.web.admission import Caller

SHARES = 16
"""How many of the largest bodies a node holds; one caller a quarter of them."""

SMALL_BYTES = 8192
"""Bytes of a body that can be parsed within two milliseconds, whatever it contains."""

REFUSED_SECONDS = 1.0
"""Seconds after which the sender of a large body is told that it was refused."""


class Bodies:
    """What one node holds.

    Args:
        largest: bytes that one body may have.
    """

    def __init__(self, largest: int, clock: Clock) -> None:
        self.clock = clock
        self._most = SHARES * largest
        self._total = 0
        self._of: Counter[Caller] = Counter()

    @property
    def total(self) -> int:
        """Bytes that are held."""
        return self._total

    @property
    def callers(self) -> int:
        """Those whose bodies are held."""
        return len(self._of)

    @contextmanager
    def body(self, caller: Caller) -> Iterator[Body]:
        """A body of a caller, for as long as the context lasts at most."""
        body = Body(self, caller)
        try:
            yield body
        finally:
            body.drop()

    def check(self, caller: Caller, more: int, size: int) -> None:
        """Check that there is room for ``more`` bytes of a body that has ``size`` then.

        Raises:
            NodeFull: there is not.
        """
        most = self._most if size > SMALL_BYTES else self._most * 5 // 4
        if self._of[caller] + more > most // 4:
            message = "This node holds as many of your bodies as it may; wait for answers before you send more."
            raise NodeFull(message)
        if self._total + more > most:
            message = "This node holds as many bodies as it may; try again or ask another one."
            raise NodeFull(message)

    def add(self, caller: Caller, more: int) -> None:
        """Count what was read, or let go of."""
        self._total += more
        self._of[caller] += more
        if not self._of[caller]:
            del self._of[caller]


class Body:
    """The body of one exchange."""

    def __init__(self, bodies: Bodies, caller: Caller) -> None:
        self._bodies, self._caller, self._size = bodies, caller, 0
        self._announced = 0
        self.text = b""
        """All of it, once it was read, and until it was dropped."""

    @property
    def small(self) -> bool:
        """Whether it may be looked into at once."""
        return self._size <= SMALL_BYTES

    def expect(self, size: int) -> None:
        """Check that there is room for all of it, as it was announced.

        Args:
            size: bytes.

        Raises:
            NodeFull: there is not.
        """
        self._announced = size
        self._bodies.check(self._caller, size, size)

    def grow(self, more: int) -> None:
        """Count a piece of it that has come.

        Raises:
            NodeFull: there is no room for it.
        """
        self._bodies.check(self._caller, more, self._size + more)
        self._bodies.add(self._caller, more)
        self._size += more

    async def refused(self) -> None:
        """Return when its sender may be told that it was refused: at once, if it is small."""
        self.text = b""
        if max(self._size, self._announced) > SMALL_BYTES:
            await self._bodies.clock.sleep(REFUSED_SECONDS)

    def drop(self) -> None:
        """Hold it no longer."""
        self.text = b""
        self._bodies.add(self._caller, -self._size)
        self._size = self._announced = 0
