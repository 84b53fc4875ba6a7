"""From a served target to its adapter and its HTTP surroundings.

The SDK builds a whole Starlette application around a server: authentication, OAuth metadata, custom routes. It is built
here too, and taken apart: its authentication goes in front of our endpoint, its other routes stay as they are. So the
settings of the served server are honoured without being read one by one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp.server import Server
from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from pgmcp.errors import TargetError
from pgmcp.session.adapter import Adapter
from pgmcp.session.adapters.sdk import SdkAdapter
from pgmcp.session.state import hooks_of


@dataclass(frozen=True, slots=True)
class Target:
    """A served server.

    ``protect`` puts the server's authentication in front of an endpoint; ``routes`` are its other routes.
    """

    adapter: Adapter
    protect: Callable[[ASGIApp], ASGIApp]
    routes: Sequence[BaseRoute]


def target_of(served: object, path: str) -> Target:
    """Adapt a server object.

    Args:
        served: an ``MCPServer`` or a low-level ``Server`` of mcp 2.x.
        path: where the endpoint will be.

    Raises:
        TargetError: it is neither.
    """
    if not isinstance(served, (MCPServer, Server)):
        kind = f"{type(served).__module__}.{type(served).__qualname__}"
        message = f"The target is a {kind}; pgmcp serves mcp.server.MCPServer and mcp.server.Server objects (mcp 2.x)."
        raise TargetError(message)
    whole = served.streamable_http_app(streamable_http_path=path)
    server: Server[Any] = served.session_manager.app
    endpoint = next(route for route in whole.routes if isinstance(route, Route) and route.path == path)
    return Target(
        adapter=SdkAdapter(server, hooks_of(served)),
        protect=lambda app: _protected(app, whole, endpoint),
        routes=[route for route in whole.routes if route is not endpoint],
    )


def _protected(app: ASGIApp, whole: Starlette, endpoint: Route) -> ASGIApp:
    guard = endpoint.app
    if isinstance(guard, RequireAuthMiddleware):
        app = RequireAuthMiddleware(app, guard.required_scopes, guard.resource_metadata_url)
    for middleware in reversed(whole.user_middleware):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return app


def load(target: str) -> object:
    """Import ``module:attribute`` or ``path/to/file.py:attribute``.

    Raises:
        TargetError: there is no such module, file or attribute, or importing it fails.
    """
    module_name, colon, attribute = target.rpartition(":")
    if not colon or not module_name or not attribute:
        message = f"The target {target!r} is not of the form module:attribute or path/to/file.py:attribute."
        raise TargetError(message)
    try:
        found: Any = _file(Path(module_name)) if module_name.endswith(".py") else _module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        message = f"The target {target!r} cannot be loaded: {error}."
        raise TargetError(message) from error
    return found


def _module(name: str) -> object:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _file(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        message = f"{path} is no Python file"
        raise ImportError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
