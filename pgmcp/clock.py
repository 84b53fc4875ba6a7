"""The only source of time and randomness, so that tests can put their own in its place."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from uuid import UUID

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """Time as one node measures it."""

    def boottime(self) -> float:
        """Seconds of a clock that also counts while the machine is suspended (trust depends on that)."""
        return time.clock_gettime(_BOOTTIME)

    def wall(self) -> float:
        """Seconds since 1970; for humans and file names, and for what others have dated (see ``moment``)."""
        return time.time()

    def moment(self, wall: float) -> float:
        """When the date is ``wall``, by this clock, as both stand now: what is done to the date later moves nothing.

        Args:
            wall: seconds since 1970; infinite for never.
        """
        return self.boottime() + wall - self.wall()

    async def sleep(self, seconds: float) -> None:
        """Pause the calling task."""
        await asyncio.sleep(seconds)

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Wait for the event at most ``seconds``; whether it is set."""
        if event.is_set():
            return True
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True


class Ids:
    """Randomness as one node draws it."""

    def uuid(self) -> UUID:
        """A version 7 uuid: ids of one process ascend, which keeps index inserts local and locks in order."""
        stamp = time.time_ns()
        milliseconds, rest = divmod(stamp, 1_000_000)
        fraction = (rest << 12) // 1_000_000
        tail = int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1)
        return UUID(int=(milliseconds << 80) | (7 << 76) | (fraction << 64) | (0b10 << 62) | tail)

    def token(self) -> str:
        """An unguessable name: 32 hex digits."""
        return secrets.token_hex(16)

    def number(self, below: int) -> int:
        """A random integer from 0 to ``below`` - 1."""
        return secrets.randbelow(below)

    def jitter(self, seconds: float) -> float:
        """A random duration from half to all of ``seconds``."""
        return seconds * (0.5 + secrets.randbelow(1000) / 2000)
