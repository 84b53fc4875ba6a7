"""The ASGI application of a node: its endpoints, the served server's other routes, and Litestar for the rest.

Endpoints are looked up by path before any router runs: they are the hot path, and the served server may have a route
for any path that is not theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from litestar import Litestar
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgmcp.errors import PgmcpError


class Application:
    """One node for any ASGI server; its lifespan is Litestar's.

    Args:
        endpoints: the MCP endpoints by their paths.
        routes: the served server's other routes.
        litestar: everything else: health, operations, lifespan, and "not found".
        lifespan: runs the node, for applications that this one is mounted in (they get the server's lifespan events).
        around: goes around the whole.
        failure: why the node could not start, when it could not.
    """

    def __init__(
        self,
        endpoints: Mapping[str, ASGIApp],
        routes: Sequence[BaseRoute],
        litestar: Litestar,
        lifespan: Callable[[], AbstractAsyncContextManager[None]],
        around: Callable[[ASGIApp], ASGIApp],
        failure: Callable[[], PgmcpError | None],
    ) -> None:
        self._endpoints, self._routes, self._litestar = dict(endpoints), list(routes), litestar
        self.lifespan, self._failure = lifespan, failure
        self._others = Starlette(routes=self._routes)
        self._whole = around(self._dispatch)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an exchange, or run the lifespan."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            await self._whole(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run Litestar's lifespan; the HTTP server logs why the node could not start in one line, without a trace."""

        async def in_a_line(message: Message) -> None:
            failure = self._failure()
            if message["type"] == "lifespan.startup.failed" and failure is not None:
                message = {**message, "message": str(failure)}
            await send(message)

        try:
            await self._litestar(scope, receive, in_a_line)  # type: ignore[arg-type]
        except Exception:  # a group, as Litestar raises it
            if self._failure() is None:
                raise

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._choose(scope)(scope, receive, send)

    def _choose(self, scope: Scope) -> ASGIApp:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            endpoint = self._endpoints.get(path.rstrip("/"))
            if endpoint is not None:
                return endpoint
            if any(route.matches(scope)[0] is not Match.NONE for route in self._routes):
                return self._others
        return self._litestar  # type: ignore[return-value]
