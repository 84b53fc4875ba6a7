"""The watchdog: a thread that says where the event loop stands when it stands.

A tool that blocks (``time.sleep``, ``requests`` in an ``async def``) blocks renewals, probes and streams of its node
with it, and the other nodes declare that dead. Only another thread can see what the loop's thread is doing then.

Invariants:
- One thread watches one event loop, however many nodes run in it, and ends with the last of them.
- It holds no lock while it logs, and nobody waits for it: a log that blocks holds up nothing but the watchdog.
- Where the whole process stood (frozen, suspended, starved) no tool is to blame: the thread was late itself, and says
  nothing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from pgmcp.clock import Clock

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
"""Seconds between two ticks of the loop, and between two looks of the thread."""

BLOCKED_SECONDS = 1.0
"""Seconds without a tick after which the loop counts as blocked."""

LOG_SECONDS = 60.0
"""Seconds between two stacks in the log, at least."""

_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Watchdog] = WeakKeyDictionary()


class Watchdog:
    """What watches one event loop; see ``watched``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self._loop, self._clock = loop, clock
        self._watched = threading.get_ident()
        self.ticked_at = clock.boottime()
        """When the loop ticked last, by the clock."""
        self._said_at = -LOG_SECONDS
        self._stopped = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._reported = False
        self.blocked = 0
        """How often the loop was blocked."""
        self.nodes = 0
        """How many nodes rely on it."""

    def start(self) -> None:
        """Begin to watch the event loop of the calling thread."""
        self._tick()
        threading.Thread(target=self._watch, name="pgmcp watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer; the thread ends by itself."""
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        now = self._clock.boottime()
        if self._reported:
            self._reported = False
            logger.warning("the event loop goes on after %.1f s", now - self.ticked_at)
        self.ticked_at = now
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)

    def _watch(self) -> None:
        looked_at, seen, stood_until = self._clock.boottime(), 0.0, 0.0
        while not self._stopped.wait(TICK_SECONDS):
            before, looked_at = looked_at, self._clock.boottime()
            ticked_at = self.ticked_at
            if looked_at - before > BLOCKED_SECONDS:
                stood_until = looked_at  # the whole process stood, and its loop has not had its turn yet
            if looked_at - max(ticked_at, stood_until) < BLOCKED_SECONDS or ticked_at == seen:
                continue
            seen = ticked_at  # each time that it is blocked counts once
            self.blocked += 1
            if looked_at - self._said_at >= LOG_SECONDS:
                self._said_at = looked_at
                self._say(looked_at - ticked_at)

    def _say(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._watched)  # noqa: SLF001 - the one way to another thread's stack
        if frame is not None:
            self._reported = True
            logger.warning(
                "the event loop has been blocked for %.1f s (%d times so far): nothing else of this node runs "
                "meanwhile, and after some seconds the others declare it dead. Let what blocks run in a thread "
                "(asyncio.to_thread), or make the tool a plain def. It stands here:\n%s",
                seconds,
                self.blocked,
                "".join(traceback.format_stack(frame)),
            )


@contextmanager
def watched(clock: Clock) -> Iterator[Watchdog]:
    """Watch the running event loop for as long as the context lasts."""
    loop = asyncio.get_running_loop()
    found = _of_loop.get(loop)
    if found is None:
        found = _of_loop[loop] = Watchdog(loop, clock)
        found.start()
    found.nodes += 1
    try:
        yield found
    finally:
        found.nodes -= 1
        if not found.nodes:
            del _of_loop[loop]
            found.stop()
