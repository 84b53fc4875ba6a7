"""Which kinds of servers can be served: a new adapter is named here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from pgmcp.session.adapter import Adapted
from pgmcp.session.adapters import sdk


@dataclass(frozen=True, slots=True)
class ServerKind:
    """Servers of one package; ``adapted`` knows its own, and gives None for a target of another kind."""

    named: str
    adapted: Callable[[object, str], Adapted | None]


def _fastmcp(served: object, path: str) -> Adapted | None:
    """FastMCP is an extra, so its adapter is imported only where it was: there may be a server of it then."""
    if "fastmcp" not in sys.modules:
        return None
    from pgmcp.session.adapters import fastmcp  # noqa: PLC0415 - see above

    return fastmcp.adapted(served, path)


KINDS = (
    ServerKind("MCPServer and Server objects (mcp 2.x)", sdk.adapted),
    ServerKind("FastMCP ones (4.x)", _fastmcp),
)
