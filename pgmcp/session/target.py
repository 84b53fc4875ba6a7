"""From a served target to its adapter and its HTTP surroundings.

The SDK builds a whole Starlette application around a server: authentication, OAuth metadata, custom routes. It is built
here too, and taken apart: its authentication goes in front of our endpoint, its other routes stay as they are. So the
settings of the served server are honoured without being read one by one.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pgmcp.errors import TargetError
from pgmcp.session.adapter import Adapter, Bus
from pgmcp.session.adapters.kinds import KINDS


@dataclass(frozen=True, slots=True)
class Target:
    """A served server.

    ``name`` is the same on all nodes that serve it. ``bus`` is where it publishes and listens, unless it has a bus of
    its own. ``protect`` puts the server's authentication in front of an endpoint; ``routes`` are its other routes.
    """

    name: str
    adapter: Adapter
    bus: Bus
    protect: Callable[[ASGIApp], ASGIApp]
    routes: Sequence[BaseRoute]


def target_of(served: object, path: str) -> Target:
    """Adapt a server object.

    Args:
        served: a server of one of the ``KINDS``.
        path: where the endpoint will be.

    Raises:
        TargetError: it is of none of them.
    """
    found = next((found for kind in KINDS if (found := kind.adapted(served, path)) is not None), None)
    if found is None:
        what = f"{type(served).__module__}.{type(served).__qualname__}"
        message = f"The target is a {what}; pgmcp serves {' and '.join(kind.named for kind in KINDS)}."
        raise TargetError(message)
    whole = found.whole
    endpoint = next(route for route in whole.routes if isinstance(route, Route) and route.path == path)
    return Target(
        name=found.name,
        adapter=found.adapter,
        bus=found.bus,
        protect=lambda app: _protected(app, whole, endpoint),
        routes=[route for route in whole.routes if route is not endpoint],
    )


def _protected(app: ASGIApp, whole: Starlette, endpoint: Route) -> ASGIApp:
    if isinstance(endpoint.app, RequireAuthMiddleware):
        guard = copy.copy(endpoint.app)  # FastMCP has arguments of its own
        guard.app = app
        app = guard
    for middleware in reversed(whole.user_middleware):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)

    async def known(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = whole  # as in the application itself: middleware looks there for its settings
        await protected(scope, receive, send)

    protected = app
    return known


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
    _look_in(Path.cwd())
    return importlib.import_module(name)


def _look_in(folder: Path) -> None:
    """Let modules be imported from a folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _file(path: Path) -> object:
    """Run a file, which may import those beside it; by its path, since its name may be that of another module."""
    _look_in(path.absolute().parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        message = f"{path} is no Python file"
        raise ImportError(message)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
