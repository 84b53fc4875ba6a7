"""A node that leaves parts with its connections, one answer after the other.

A balancer that keeps connections sends a POST into one at any time, also in the moment in which a server closes it, and
does not repeat it. So while a node drains each answer says that its connection is over.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class ConnectionClose:
    """An ASGI application around another one.

    Args:
        leaving: whether the node leaves.
    """

    def __init__(self, app: ASGIApp, leaving: Callable[[], bool]) -> None:
        self._app, self._leaving = app, leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an exchange; HTTP/2 and later have no such header."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._leaving():
                headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
            await send(message)

        old = scope["type"] == "http" and scope.get("http_version", "1.1").startswith("1")
        await self._app(scope, receive, closing if old else send)
