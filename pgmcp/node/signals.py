"""SIGTERM, SIGINT and SIGHUP, noticed before the HTTP server notices them.

An HTTP server that gets SIGTERM closes its port at once, while balancers still send requests, and then waits for
streams that never end. So the first signal drains the node, and is handed to the server's own handler when that is
done. It is the same under any server that sets its handlers by ``signal.signal`` before it starts the application.

SIGHUP, of a terminal that closes, is as SIGTERM where it would end the process: `nohup` has it ignored, and a server
may have a handler for it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

NOTICED = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """While the context lasts, a signal is obeyed after the node has drained; a second one at once.

    Outside of the main thread, where no handler can be set, it does nothing.

    Args:
        drain: what comes first.
        hurry: called when a second signal comes, before that is obeyed.
    """

    def __init__(self, drain: Callable[[], Awaitable[None]], hurry: Callable[[], None]) -> None:
        self._drain, self._hurry = drain, hurry
        self._loop = asyncio.get_running_loop()
        self._before: dict[int, Any] = {}
        self._draining: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = (*NOTICED, signal.SIGHUP) if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else NOTICED
            self._before = {number: signal.signal(number, self._on_signal) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)
        if self._draining is not None:
            self._draining.cancel()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._noticed, number)

    def _noticed(self, number: int) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drained(number))
        else:
            self._hurry()
            self._obey(number)

    async def _drained(self, number: int) -> None:
        try:
            await self._drain()
        except Exception:
            logger.exception("the drain failed; the node leaves as it is")
        self._obey(number)

    def _obey(self, number: int) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        handler = self._before[number]
        if callable(handler):
            handler(number, None)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
