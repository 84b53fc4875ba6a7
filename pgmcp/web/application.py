"""The ASGI application of a node: the endpoint, the served server's other routes, health."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from litestar import Litestar, asgi
from litestar.handlers import HTTPRouteHandler
from litestar.types import Receive, Scope, Send
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from pgmcp.settings import LOOPBACK, Settings


def application(
    endpoint: ASGIApp,
    *,
    path: str,
    routes: Sequence[BaseRoute],
    health: Sequence[HTTPRouteHandler],
    lifespan: Callable[[Litestar], AbstractAsyncContextManager[None]],
) -> Litestar:
    """Put a node's application together.

    Args:
        endpoint: the protected MCP endpoint.
        path: where it is.
        routes: the served server's other routes; they get whatever nobody else wants.
        health: the health routes.
        lifespan: starts and stops the node.
    """
    rest = Starlette(routes=list(routes))

    @asgi(path, is_mount=True, copy_scope=True)
    async def mcp(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint(scope, receive, send)  # type: ignore[arg-type]

    @asgi("/", is_mount=True, copy_scope=True)
    async def others(scope: Scope, receive: Receive, send: Send) -> None:
        await rest(scope, receive, send)  # type: ignore[arg-type]

    handlers = [mcp, *health] + ([others] if routes else [])
    return Litestar(route_handlers=handlers, lifespan=[lifespan], openapi_config=None, logging_config=None)


def host_rules(settings: Settings) -> TransportSecurityMiddleware:
    """The SDK's Host and Origin rules: loopback names on a loopback address, else what the operator lists."""
    hosts, origins = list(settings.allowed_hosts), list(settings.allowed_origins)
    if not hosts and settings.host in LOOPBACK:
        names = ("127.0.0.1", "localhost", "[::1]")
        hosts = [*names, *(f"{name}:*" for name in names)]
        origins = origins or [f"http://{name}{port}" for name in names for port in ("", ":*")]
    return TransportSecurityMiddleware(
        TransportSecuritySettings(
            enable_dns_rebinding_protection=bool(hosts), allowed_hosts=hosts, allowed_origins=origins
        )
    )
