"""pgmcp inside programs that bring their own ASGI server or application."""

from __future__ import annotations

from typing import Any

from litestar import asgi
from litestar.config.app import AppConfig
from litestar.handlers import ASGIRouteHandler
from litestar.plugins import InitPlugin
from litestar.types import Receive, Scope, Send
from mcp.server.subscriptions import ServerEvent
from starlette.types import ASGIApp

from pgmcp.node import Node
from pgmcp.session.sdk.bus import publications_of
from pgmcp.settings import Settings
from pgmcp.store.publications import publish_from_outside
from pgmcp.web.application import Application


class Cluster:
    """A cluster that this process takes part in.

    Args:
        database_url: PostgreSQL to coordinate through; without it ``PGMCP_DATABASE_URL``.
        options: further settings, by the names of ``Settings``.

    Raises:
        SettingsError: a setting cannot work.
    """

    def __init__(self, database_url: str = "", **options: Any) -> None:
        self.settings = Settings(**({"database_url": database_url} if database_url else {}), **options)

    def app(self, served: object) -> Application:
        """An ASGI application that serves an MCP server on one node; its lifespan joins and leaves the cluster.

        Mounted in another application it gets no lifespan events: run ``app.lifespan()`` from that one's.

        Args:
            served: an ``MCPServer`` or a low-level ``Server``.

        Raises:
            TargetError: it is neither.
            SettingsError: no database is given.
        """
        return Node(self.settings, served).application()

    async def publish(self, *events: ServerEvent) -> None:
        """Tell the cluster's clients that something has changed, from a script that serves nothing.

        All of the events are stored or none; every node hears of them when this returns.

        Args:
            events: what has changed, as ``mcp.server.subscriptions`` names it: ``ResourceUpdated(uri="…")``,
                ``ToolsListChanged()``, ``PromptsListChanged()``, ``ResourcesListChanged()``.

        Raises:
            PublicationRefused: one of them is no such event, or its uri cannot be stored.
            DatabaseUnavailable: PostgreSQL cannot be reached, or does not answer in time.
            SchemaError: the schema is missing or older than this build.
        """
        await publish_from_outside(self.settings, publications_of(events))


class ClusterPlugin(InitPlugin):
    """Serves an MCP server from inside a Litestar application, whose lifespan joins and leaves the cluster.

    Args:
        served: an ``MCPServer`` or a low-level ``Server``.
        database_url: PostgreSQL to coordinate through; without it ``PGMCP_DATABASE_URL``.
        options: further settings, by the names of ``Settings``.

    Raises:
        TargetError: it is neither.
        SettingsError: a setting cannot work, or no database is given.
    """

    def __init__(self, served: object, database_url: str = "", **options: Any) -> None:
        self._node = Node(Cluster(database_url, **options).settings, served)

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Add the endpoints, the health routes and the lifespan."""
        for path, endpoint in self._node.endpoints().items():
            app_config.route_handlers.append(_mount(path, self._node.wrapped(endpoint)))
        app_config.route_handlers.extend(self._node.health())
        app_config.lifespan.append(lambda _: self._node.running())
        return app_config


def _mount(path: str, app: ASGIApp) -> ASGIRouteHandler:
    @asgi(path, is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)  # type: ignore[arg-type]

    return mounted
