"""Run an unchanged MCP server on many nodes, with PostgreSQL as the only coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pgmcp.types import VERSION

if TYPE_CHECKING:
    from pgmcp.hosting import Cluster, ClusterPlugin
    from pgmcp.session.sdk.bus import PostgresSubscriptionBus
    from pgmcp.session.state import SessionState, keep_memory, session_state

__version__ = VERSION
__all__ = [
    "Cluster",
    "ClusterPlugin",
    "PostgresSubscriptionBus",
    "SessionState",
    "__version__",
    "keep_memory",
    "session_state",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for: a command that only prints its version must not load a web server."""
    if name in {"Cluster", "ClusterPlugin"}:
        from pgmcp import hosting  # noqa: PLC0415 - see above

        return getattr(hosting, name)
    if name == "PostgresSubscriptionBus":
        from pgmcp.session.sdk import bus  # noqa: PLC0415 - see above

        return bus.PostgresSubscriptionBus
    if name in {"SessionState", "keep_memory", "session_state"}:
        from pgmcp.session import state  # noqa: PLC0415 - see above

        return getattr(state, name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
