"""Liveness and readiness.

``/livez`` says that the event loop and the renew loop tick, and that the node does not fail again and again for reasons
of its own; it never asks the database, or an outage would restart every node. ``/readyz`` says that the node should get
traffic; an outage makes it 503 only after the hold, or balancers would empty the cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

STALLED_SECONDS = 5.0
"""Seconds without a tick of the renew loop after which the process counts as stuck."""


class Pulse(Protocol):
    """What health needs to know of a node."""

    def stalled(self) -> float:
        """Seconds since the renew loop ticked."""
        ...

    def failing(self) -> bool:
        """Whether the node fails again and again, so that only a new process may help."""
        ...

    def unready(self) -> str | None:
        """Why the node should get no traffic now; None when it should."""
        ...


def health_routes(pulse: Callable[[], Pulse]) -> list[HTTPRouteHandler]:
    """The two routes."""

    @get("/livez", sync_to_thread=False, include_in_schema=False)
    def livez() -> Response[dict[str, str]]:
        seconds = pulse().stalled()
        if seconds > STALLED_SECONDS:
            return Response({"status": f"the renew loop has not ticked for {seconds:.1f} s"}, status_code=503)
        if pulse().failing():
            return Response({"status": "the node fails again and again; its log says why"}, status_code=503)
        return Response({"status": "alive"})

    @get("/readyz", sync_to_thread=False, include_in_schema=False)
    def readyz() -> Response[dict[str, str]]:
        reason = pulse().unready()
        return Response({"status": reason or "ready"}, status_code=503 if reason else 200)

    return [livez, readyz]
