"""Time that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Sized

from pgmcp.clock import Clock

TURNS = 10_000
"""Rounds of the event loop in which tasks must have settled after a step of time."""


async def settle() -> None:
    """Let every task run until it waits for time or for the test."""
    ready: Sized = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    for _ in range(TURNS):
        await asyncio.sleep(0)
        if not ready:
            return
    message = "tasks keep each other busy without end"
    raise AssertionError(message)


class FakeClock(Clock):
    """A clock for one test."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def boottime(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        waker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), waker))
        await waker

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        tasks = {asyncio.create_task(event.wait()), asyncio.create_task(self.sleep(seconds))}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        return event.is_set()

    def jump(self, seconds: float) -> None:
        """Move time while the process is frozen: nobody wakes yet."""
        self.now += seconds

    async def advance(self, seconds: float) -> None:
        """Move time on; whoever sleeps wakes when its time has come."""
        end = self.now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, waker = heapq.heappop(self._sleepers)
            self.now = max(self.now, due)
            if not waker.done():
                waker.set_result(None)
                await settle()
        self.now = max(self.now, end)


class StillLoop(asyncio.SelectorEventLoop):
    """An event loop whose own timers (``asyncio.timeout``) go by a fake clock: what is due runs at its next step."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._still = clock

    def time(self) -> float:
        return self._still.now
