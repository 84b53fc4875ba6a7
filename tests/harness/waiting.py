"""Waiting for a condition, with a bound: never for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

POLL = 0.01


async def eventually(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
    """Return the first true value of ``condition`` (which may be a coroutine function), or fail with the last one."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if asyncio.get_running_loop().time() > end:
            raise AssertionError(f"not within {seconds} s: {what} (last: {value!r})")
        await asyncio.sleep(POLL)


def wait_until(condition: Callable[[], bool], timeout: float, what: str | Callable[[], str]) -> None:
    """Return as soon as the condition holds; fail with ``what`` after ``timeout`` seconds. Without an event loop."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(what if isinstance(what, str) else what())
        time.sleep(2 * POLL)
