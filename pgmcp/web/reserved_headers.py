"""Headers that only the node itself may give a handler: a client's own are dropped."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from pgmcp.session.adapter import RESTORED_HEADER

_NAME = RESTORED_HEADER.encode()


class ReservedHeaders:
    """An endpoint whose clients cannot pose as the node.

    Args:
        app: the endpoint.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one exchange."""
        if any(name == _NAME for name, _ in scope.get("headers", ())):
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != _NAME]}
        await self._app(scope, receive, send)
