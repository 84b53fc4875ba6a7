"""Connects to the one of several servers that can be worked with.

Invariants:
- A server that does not answer at all keeps nobody from the next one: after ``STAGGER_SECONDS`` that is asked, too.
- Whoever is not chosen is hung up on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from pgmcp.store.connection import tls
from pgmcp.store.connection.address import AddressMalformed, AddressUnread, place, servers
from pgmcp.store.connection.error_text import REFUSALS, WillNotDo

STAGGER_SECONDS = 0.3
"""Seconds after which the next server is asked while one has not answered yet."""

Check = Callable[[asyncpg.Connection], Awaitable[None]]


async def _any(_: asyncpg.Connection) -> None:
    return None


async def connect(url: str, *, timeout: float, check: Check = _any, **options: Any) -> asyncpg.Connection:
    """Open a connection to the first server of the URL that answers and is what the URL wants.

    This is where every connection is opened, so that an address in a file is read anew for each.

    Args:
        url: one server or several.
        timeout: seconds, for all servers together.
        check: raises if the server will not do.
        options: whatever else ``asyncpg.connect`` takes.

    Raises:
        TimeoutError: none was found in time.
        AddressUnread: something is wrong with the address itself.
        OSError: none can be worked with; the message has a reason for each.
        Exception: with one server, whatever asyncpg raises.
    """
    each = servers(url)

    async def ask(server: str) -> asyncpg.Connection:
        tls.check(server)
        try:
            connection: asyncpg.Connection = await asyncpg.connect(server, timeout=timeout, **options)
        except Exception as error:
            found = tls.explained(error)
            if isinstance(found, (ValueError, OverflowError)):
                raise AddressMalformed from None
            raise found from error
        try:
            await check(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async with asyncio.timeout(timeout):
        return await (ask(each[0]) if len(each) == 1 else _first(each, ask))


async def _first(waiting: list[str], ask: Callable[[str], Awaitable[asyncpg.Connection]]) -> asyncpg.Connection:
    asked: dict[asyncio.Future[asyncpg.Connection], str] = {}
    reasons: dict[str, str] = {}
    hopeless = True
    try:
        while waiting or asked:
            if waiting:
                server = waiting.pop(0)
                asked[asyncio.ensure_future(ask(server))] = server
            done, _ = await asyncio.wait(
                asked, timeout=STAGGER_SECONDS if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in [task for task in asked if task in done]:
                error = task.exception()
                if error is None:
                    del asked[task]
                    return task.result()
                if isinstance(error, AddressUnread) or not isinstance(
                    error, (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
                ):
                    raise error
                reasons[place(asked.pop(task))] = _reason(error)
                hopeless = hopeless and isinstance(error, REFUSALS)
    finally:
        for task in asked:
            task.add_done_callback(_hang_up)
            task.cancel()
    message = "; ".join(f"{where}: {reason}" for where, reason in reasons.items())
    raise WillNotDo(message) if hopeless else ConnectionError(message)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        return "it is no server that takes writes, perhaps a standby"
    return str(error) or type(error).__name__


def _hang_up(task: asyncio.Future[asyncpg.Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().terminate()
