"""From a served target to its adapter and its HTTP surroundings.

The SDK builds a whole Starlette application around a server: authentication, OAuth metadata, custom routes. It is built
here too, and taken apart: its authentication goes in front of our endpoint, its other routes stay as they are. So the
settings of the served server are honoured without being read one by one.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pgmcp.errors import TargetError
from pgmcp.session.adapter import Adapter, Bus
from pgmcp.session.adapters.kinds import KINDS
from pgmcp.session.user_code import module_in, module_named, told, trace_of


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
        hint = " If it returns one when it is called, add --factory." if inspect.isroutine(served) else ""
        message = (
            f"What TARGET names is {_kind(served)}; pgmcp serves {' and '.join(kind.named for kind in KINDS)}.{hint}"
        )
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


def load(target: str) -> Any:
    """Import ``module:attribute`` or ``path/to/file.py:attribute``.

    Raises:
        TargetError: there is no such module, file or attribute, or importing it fails; then it has the trace.
    """
    name, attribute = check(target)
    refused = f"The target {target!r} cannot be loaded"
    with told(refused):
        try:
            module = module_in(Path(name)) if name.endswith(".py") else module_named(name)
        except ModuleNotFoundError as error:
            if not trace_of(error):  # it is the target itself that was not found, or a package on the way to it
                detail = str(error) if "not a package" in str(error) else f"there is no module {error.name}"
                message = f"{refused}: {detail} in {Path.cwd()} or installed."
                raise TargetError(message) from error
            raise
        except ImportError as error:
            if "relative import" in str(error) and (module_name := _inside_package(Path(name))):
                message = f"The target {target!r} is part of a package: name it {module_name}:{attribute}."
                raise TargetError(message) from error
            raise
    return _attribute(module, attribute, refused, name)


def _attribute(module: object, attribute: str, refused: str, name: str) -> Any:
    found: Any = module
    parts = attribute.split(".")
    for depth, part in enumerate(parts):
        if not hasattr(found, part):
            outer = ".".join([*parts[:depth], ""])
            alike = [f"{outer}{each}" for each in difflib.get_close_matches(part, dir(found), 1)]
            hint = f"; did you mean {alike[0]}?" if alike else "."
            message = f"{refused}: {name} has no attribute {outer}{part}{hint}"
            raise TargetError(message)
        found = getattr(found, part)
    return found


def created(target: str, run: Callable[[Coroutine[Any, Any, object]], object]) -> object:
    """What the factory of that name returns: a callable without arguments, asynchronous or not.

    Args:
        target: as for ``load``.
        run: runs a coroutine to its end.

    Raises:
        TargetError: as for ``load``; or it is no callable, or it fails.
    """
    factory = load(target)
    if not callable(factory):
        message = f"The target {target!r} is {_kind(factory)}, which cannot be called: serve it without --factory."
        raise TargetError(message)
    with told(f"The factory {target!r} failed"):
        made = factory()
        return run(made) if inspect.iscoroutine(made) else made


def middleware(name: str) -> Callable[[ASGIApp], ASGIApp]:
    """The ASGI middleware of that name, to be put around an application.

    Args:
        name: of a class or function that takes the application, as for ``load``.

    Raises:
        TargetError: as for ``load``; or it cannot be called. What is returned raises it when that call fails.
    """
    found = load(name)
    if not callable(found):
        message = f"The middleware {name!r} is {_kind(found)}; name a class or function that takes an ASGI application."
        raise TargetError(message)

    def wrap(app: ASGIApp) -> ASGIApp:
        with told(f"The middleware {name!r} failed"):
            return cast("ASGIApp", found(app))

    return wrap


def check(target: str) -> tuple[str, str]:
    """Refuse at once what cannot be loaded, as far as that can be seen without running it.

    Returns:
        The module or file, and the attribute.

    Raises:
        TargetError: it is no name of a target, there is no such file or package, or it is not written in Python.
    """
    name, colon, attribute = target.rpartition(":")
    if not colon or not name or not attribute:
        message = (
            f"The target {target!r} is not of the form module:attribute or path/to/file.py:attribute (server.py:mcp)."
        )
        raise TargetError(message)
    refused = f"The target {target!r} cannot be loaded"
    if name.endswith(".py"):
        path = Path(name).absolute()
        if not path.is_file():
            message = f"{refused}: there is no file {path}."
            raise TargetError(message)
        with told(refused):
            compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    elif not _importable(name.partition(".")[0]):
        message = f"{refused}: there is no module {name} in {Path.cwd()} or installed."
        raise TargetError(message)
    return name, attribute


def _importable(top: str) -> bool:
    return bool(top) and (find_spec(top) or PathFinder.find_spec(top, [str(Path.cwd())])) is not None


def _inside_package(path: Path) -> str:
    """The name under which a file is imported that lies in a package; empty for others."""
    path = path.absolute()
    parts = [path.stem]
    for folder in path.parents:
        if not (folder / "__init__.py").is_file():
            break
        parts.insert(0, folder.name)
    return ".".join(parts) if len(parts) > 1 else ""


def _kind(found: object) -> str:
    return f"a {type(found).__module__}.{type(found).__qualname__}".replace("a builtins.", "of type ")
