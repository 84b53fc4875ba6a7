"""Services: the parts of a node that work by themselves, all of one shape, and what becomes of errors nobody expects.

Invariants:
- A service works in its ``run``, and in ``Tasks`` of its own; nothing else of a node works unseen.
- What ``run`` raises, and an end that nobody asked for, ends the service's whole structure in order (see
  ``node.incarnation``), and the node begins anew. An error of one of the ``Tasks`` is of one session or client: it
  costs nobody else anything, and what was left undone is found again by the rounds.
- Both are logged with their traces and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import Any

from pgmcp.clock import Clock, Ids
from pgmcp.errors import PgmcpError
from pgmcp.trouble import Trouble

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.05
"""Seconds between two looks that others want: anybody may want them, as often as he likes."""

PAUSE_FACTOR, LONGEST_PAUSE_SECONDS = 3, 1.0
"""Times as long as a look took is the pause after it, and how many seconds that is at most."""


class Service:
    """One part of a node; by itself it has nothing to do at its start and its end."""

    async def start(self) -> None:
        """Get ready, so that ``run`` can begin.

        Raises:
            PgmcpError: that is not possible now.
        """

    async def run(self) -> None:
        """Work until cancelled; what can be expected to go wrong is dealt with inside."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Hold nothing any more; called when ``run`` has ended, and also when the start failed."""


async def failure(service: Service) -> BaseException | None:
    """Run a service; why it failed, or None when it ended by itself."""
    try:
        await service.run()
    except asyncio.CancelledError as cancelled:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return cancelled  # of something that it waited for: nobody has cancelled the service
    except Exception as error:  # noqa: BLE001 - whoever asked has to deal with it
        return error
    return None


class Faults:
    """The unexpected errors of one node's background work, counted by duty."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, duty: str, error: BaseException) -> None:
        """Log an error with its trace, and count it."""
        self.counts[duty] += 1
        logger.error(
            "%s failed in a way that nobody expected (%d times since this node's start): please report it",
            duty,
            self.counts[duty],
            exc_info=error,
        )


class Tasks:
    """Tasks of one service that come and go.

    Args:
        duty: what they do, for the log.
        faults: where their unexpected errors are counted.
    """

    def __init__(self, duty: str, faults: Faults) -> None:
        self._duty, self._faults = duty, faults
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], *, context: Context | None = None) -> asyncio.Task[None]:
        """Begin a task; it is held until it ends."""
        task = asyncio.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._faults.note(self._duty, error)

    async def close(self) -> None:
        """Cancel them all, and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class OnDemand(Service):
    """Looks that others want: the first at once, and the next after a pause, however often they are wanted.

    Args:
        look: one look. Its expected errors (``PgmcpError``) only delay it.
        pause: seconds between two looks, at least; longer where looks take long, so that they cost a bounded share.
    """

    def __init__(self, look: Callable[[], Awaitable[None]], clock: Clock, pause: float = PAUSE_SECONDS) -> None:
        self._look, self._clock, self._pause = look, clock, pause
        self._trouble = Trouble(_named(look), clock)
        self._wanted = asyncio.Event()

    @property
    def wanted(self) -> bool:
        """Whether a look has still to begin."""
        return self._wanted.is_set()

    def want(self) -> None:
        """Look soon; once more if that is being done."""
        self._wanted.set()

    async def run(self) -> None:
        """See ``Service.run``."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            begun = self._clock.boottime()
            try:
                await self._look()
                self._trouble.over()
            except PgmcpError as error:
                self._trouble.met(error)
            took = self._clock.boottime() - begun
            await self._clock.sleep(max(self._pause, min(PAUSE_FACTOR * took, LONGEST_PAUSE_SECONDS)))


def _always() -> bool:
    return True


def _named(work: Callable[..., object]) -> str:
    """What the log calls a piece of work that a service does again and again."""
    return f"the work {getattr(work, '__name__', 'of a service').strip('_')!r}"


class Periodic(Service):
    """A service that does one piece of work again and again.

    Args:
        seconds: between two rounds, at most; they are spread.
        work: one round. Its expected errors (``PgmcpError``) only delay it.
        allowed: rounds are left out while it says no.
    """

    def __init__(
        self,
        seconds: float,
        work: Callable[[], Awaitable[None]],
        clock: Clock,
        ids: Ids,
        *,
        allowed: Callable[[], bool] = _always,
    ) -> None:
        self._seconds, self._work, self._clock, self._ids, self._allowed = seconds, work, clock, ids, allowed
        self._trouble = Trouble(_named(work), clock)

    async def run(self) -> None:
        """See ``Service.run``."""
        while True:
            await self._clock.sleep(self._ids.jitter(self._seconds))
            if not self._allowed():
                self._trouble.paused()
                continue
            try:
                await self._work()
                self._trouble.over()
            except PgmcpError as error:
                self._trouble.met(error)
