"""The access log: one line for each HTTP exchange, at its end (a stream's line comes when the stream is over).

Invariant: no query string and no header is written, since session ids, tokens and OAuth codes travel in them (G8).
"""

from __future__ import annotations

import logging
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgmcp.clock import Clock

logger = logging.getLogger("pgmcp.access")


class AccessLog:
    """An ASGI application behind the access log.

    Args:
        app: answers the exchanges.
    """

    def __init__(self, app: ASGIApp, clock: Clock) -> None:
        self._app, self._clock = app, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one exchange and write its line."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size = self._clock.boottime(), None, 0

        async def counting(message: Message) -> None:
            nonlocal status, size
            status = message.get("status", status)
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counting)
        finally:
            _write(scope, status, self._clock.boottime() - began, size)


def _write(scope: Scope, status: int | None, seconds: float, size: int) -> None:
    """Write the line; without a status nothing was answered."""
    fields = {
        "method": scope["method"],
        "path": _path(scope),
        "status": status,
        "seconds": round(seconds, 3),
        "bytes": size,
        "client": (scope.get("client") or ("-",))[0],
    }
    logger.info(
        "%(method)s %(path)s %(status)s in %(seconds).3f s, %(bytes)d bytes to %(client)s",
        fields,
        extra={"fields": fields},
    )


def _path(scope: Scope) -> str:
    """The path as it came, before any mount shortened it; quoted, or one that has line ends would make two lines."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"], errors="replace").encode()
    return quote(raw.partition(b"?")[0], safe="/%!$&'()*+,;=:@")
