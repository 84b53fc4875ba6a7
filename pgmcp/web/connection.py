"""One HTTP exchange's connection: no client is waited for without a bound.

Invariants:
- Whatever is sent has a deadline: the connection of a client that takes nothing for ``patience`` seconds is dropped.
  One that reads slowly keeps it, for the deadline begins anew when the client has taken something.
- Large bodies go out in pieces, each when what was before it has left, so that little is buffered.
- What still lies in the buffer after the last piece has the same deadline: an orderly close waits for it for ever.

Failure handling: what is sent to a client that has gone goes nowhere, as with the HTTP server itself.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from fcntl import ioctl
from socket import IPPROTO_TCP, TCP_INFO
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 * 1024
"""Bytes of a body that are sent at once: as many as an HTTP server buffers before it makes its senders wait."""

LOOKS = 4
"""How often within a client's patience it is looked whether it has taken something."""

_KEY = "pgmcp.connection"

_LAST_DATA_RECEIVED = 52
"""Where Linux's struct tcp_info says how many milliseconds ago the last data came (tcpi_last_data_recv)."""

_TICK_SECONDS = 0.02
"""Seconds by which the kernel's count may be off."""


class Connection:
    """One exchange's end of its connection.

    Args:
        receive: the HTTP server's.
        send: the HTTP server's, or what stands around it.
        patience: seconds for which the client may take nothing of what is sent.
    """

    def __init__(self, receive: Receive, send: Send, patience: float) -> None:
        self.receive, self.patience, self._send = receive, patience, send
        self._cycle = getattr(receive, "__self__", None)  # uvicorn's
        transport = getattr(self._cycle, "transport", None)  # uvloop's is no asyncio.Transport
        self._transport: Any = transport if hasattr(transport, "get_write_buffer_size") else None
        self._limit: asyncio.Timeout | None = None
        self.started = False
        """Whether anything was sent."""
        self.gone = False
        """Whether the connection was dropped, or lost."""

    async def send(self, message: Message) -> None:
        """Send to a client that reads; one that does not is dropped."""
        self.started = True
        body = message.get("body", b"")
        for start in range(0, len(body) - PIECE_BYTES, PIECE_BYTES):
            await self._pass({**message, "body": body[start : start + PIECE_BYTES], "more_body": True})
            if self.gone:
                return
        rest = max(len(body) - 1, 0) // PIECE_BYTES * PIECE_BYTES
        await self._pass({**message, "body": body[rest:]} if rest else message)
        if message["type"] == "http.response.body" and not message.get("more_body", False) and self._lingers():
            _Watch(self, self._lingers)

    async def ready(self) -> None:
        """Return when a piece would be written at once, without waiting for the client."""
        if self._transport is None or self._buffered:
            await self._pass({"type": "http.response.body", "body": b"", "more_body": True})

    async def _pass(self, message: Message) -> None:
        if self._transport is not None and self._transport.is_closing():
            self.gone = True  # the HTTP server tells only the last exchange of a connection that it is lost
        if self.gone:
            return
        watch = _Watch(self, lambda: True)
        try:
            async with asyncio.timeout(None) as self._limit:
                await self._send(message)
        except TimeoutError:
            self.gone = True
        finally:
            watch.cancel()
            self._limit = None

    @property
    def _buffered(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def _lingers(self) -> bool:
        """Whether something of this exchange waits in the buffer, and its connection has not begun another one."""
        if not self._buffered:
            return False
        return getattr(self._transport.get_protocol(), "cycle", None) is self._cycle

    @property
    def untaken(self) -> int | None:
        """Bytes that the client's machine has not taken yet; None where that cannot be known."""
        if self._transport is None:
            return None
        with suppress(OSError, AttributeError):
            socket = self._transport.get_extra_info("socket")
            (queued,) = struct.unpack("i", ioctl(socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))
            return int(self._buffered + queued)
        return None

    @property
    def silent(self) -> float:
        """Seconds since the kernel last got anything from the client, never more than it was; 0 where it does not tell.

        What is sent to a process that stands still lies in the kernel until it goes on.
        """
        if self._transport is None:
            return 0.0
        with suppress(OSError, AttributeError, struct.error):
            socket = self._transport.get_extra_info("socket")
            told = socket.getsockopt(IPPROTO_TCP, TCP_INFO, _LAST_DATA_RECEIVED + 4)
            (milliseconds,) = struct.unpack_from("I", told, _LAST_DATA_RECEIVED)
            return max(0.0, int(milliseconds) / 1000 - _TICK_SECONDS)
        return 0.0

    def drop(self) -> None:
        """Give up a client that does not read."""
        logger.info("a client has not read for %s s; its connection is dropped", self.patience)
        self.abort()

    def abort(self) -> None:
        """End the connection at once: an orderly end waits for the client, and makes it take what it got for all."""
        self.gone = True
        if self._transport is not None:
            self._transport.abort()
        if self._limit is not None:
            self._limit.reschedule(0)


class _Watch:
    """Drops a client that takes nothing for its whole patience.

    Args:
        goes_on: asked now and then; once it is not so, the watch is over.
    """

    def __init__(self, connection: Connection, goes_on: Callable[[], bool]) -> None:
        self._connection, self._goes_on = connection, goes_on
        self._loop = asyncio.get_running_loop()
        self._untaken: int | None = None
        self._idle = 0
        self._timer = self._next()

    def _next(self) -> asyncio.TimerHandle:
        return self._loop.call_later(self._connection.patience / LOOKS, self._look)

    def _look(self) -> None:
        if not self._goes_on():
            return
        untaken, before = self._connection.untaken, self._untaken
        self._untaken = untaken
        self._idle = 0 if untaken is not None and before is not None and untaken < before else self._idle + 1
        if self._idle < LOOKS:
            self._timer = self._next()
        else:
            self._connection.drop()

    def cancel(self) -> None:
        """What was sent has left."""
        self._timer.cancel()


class Bounded:
    """An ASGI application whose clients read in time.

    Args:
        patience: see ``Connection``.
    """

    def __init__(self, app: ASGIApp, patience: float) -> None:
        self._app, self._patience = app, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an exchange."""
        if scope["type"] == "http":
            scope[_KEY] = connection = Connection(receive, send, self._patience)
            await self._app(scope, connection.receive, connection.send)
        else:
            await self._app(scope, receive, send)


def connection_of(scope: Scope) -> Connection:
    """The connection of an exchange that came through ``Bounded``."""
    connection: Connection = scope[_KEY]
    return connection


class Watch:
    """Notices a client's disconnect while something else is awaited; the body of its request was read before.

    Args:
        on_gone: called when the client has gone.
    """

    def __init__(self, receive: Receive, on_gone: Callable[[], None]) -> None:
        self._receive, self._on_gone = receive, on_gone
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.create_task(self._watch())

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self._on_gone()
