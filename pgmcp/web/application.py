"""The ASGI application of a node: the endpoint, the served server's other routes, health."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from litestar import Litestar, asgi
from litestar.handlers import ASGIRouteHandler, HTTPRouteHandler
from litestar.types import Receive, Scope, Send
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from pgmcp.settings import LOOPBACK, Settings


def application(
    endpoints: Mapping[str, ASGIApp],
    *,
    routes: Sequence[BaseRoute],
    health: Sequence[HTTPRouteHandler],
    lifespan: Callable[[Litestar], AbstractAsyncContextManager[None]],
) -> Litestar:
    """Put a node's application together.

    Args:
        endpoints: the protected endpoints by their paths.
        routes: the served server's other routes; they get whatever nobody else wants.
        health: the health routes.
        lifespan: starts and stops the node.
    """
    mounts = [_mount(path, endpoint) for path, endpoint in endpoints.items()]
    if routes:
        mounts.append(_mount("/", Starlette(routes=list(routes))))
    handlers = [*mounts, *health]
    return Litestar(route_handlers=handlers, lifespan=[lifespan], openapi_config=None, logging_config=None)


def _mount(path: str, app: ASGIApp) -> ASGIRouteHandler:
    @asgi(path, is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)  # type: ignore[arg-type]

    return mounted


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
