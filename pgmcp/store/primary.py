"""Connects to the one of several servers that can be worked with.

Invariants:
- A server that does not answer at all keeps nobody from the next one: after ``STAGGER`` that is asked, too.
- Whoever is not chosen is hung up on.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from pgmcp.store.address import place, servers

STAGGER = 0.3
"""Seconds after which the next server is asked while one has not answered yet."""


async def connect(url: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
    """Open a connection to the first server of the URL that answers and is what the URL wants.

    Args:
        url: one server or several.
        timeout: seconds, for all servers together.
        options: whatever else ``asyncpg.connect`` takes.

    Raises:
        TimeoutError: none was found in time.
        OSError: none can be worked with; the message has a reason for each.
        Exception: with one server, whatever asyncpg raises; with several, what is wrong with the address itself.
    """
    each = servers(url)
    if len(each) == 1:
        return await asyncpg.connect(each[0], timeout=timeout, **options)
    async with asyncio.timeout(timeout):
        return await _first([(server, timeout, options) for server in each])


async def _first(waiting: list[tuple[str, float, dict[str, Any]]]) -> asyncpg.Connection:
    asked: dict[asyncio.Task[asyncpg.Connection], str] = {}
    reasons: dict[str, str] = {}
    waiting = list(waiting)
    try:
        while waiting or asked:
            if waiting:
                server, timeout, options = waiting.pop(0)
                asked[asyncio.create_task(_ask(server, timeout, options))] = server
            done, _ = await asyncio.wait(
                asked, timeout=STAGGER if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in [task for task in asked if task in done]:
                error = task.exception()
                if error is None:
                    del asked[task]
                    return task.result()
                if isinstance(error, asyncpg.exceptions.ClientConfigurationError) or not isinstance(
                    error, (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
                ):
                    raise error
                reasons[place(asked.pop(task))] = str(error) or type(error).__name__
    finally:
        for task in asked:
            task.add_done_callback(_hang_up)
            task.cancel()
    message = "; ".join(f"{where}: {reason}" for where, reason in reasons.items())
    raise ConnectionError(message)


async def _ask(server: str, timeout: float, options: dict[str, Any]) -> asyncpg.Connection:
    try:
        return await asyncpg.connect(server, timeout=timeout, **options)
    except asyncpg.exceptions.TargetServerAttributeNotMatched as error:
        message = "it is no server that takes writes, perhaps a standby"
        raise ConnectionError(message) from error


def _hang_up(task: asyncio.Task[asyncpg.Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()
