"""Host and Origin: by which names clients may reach a node, and from which web pages.

Invariants:
- Each list is a rule of its own. (The SDK's middleware has no rule at all without hosts.)
- On a loopback address the default of either list are the loopback names. Elsewhere hosts have no default, and without
  origins no page may come in as soon as there are hosts.
- Pages whose scripts may call (CORS) may come in, too.
- Nothing of a refused header is logged: it is a stranger's text.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import Response

from pgmcp.settings import LOOPBACK, Settings

logger = logging.getLogger(__name__)

ANY = "*"
NAMES = ("127.0.0.1", "localhost", "[::1]")
PORTS = "the names that clients use, each as they say it, with its port unless it is 443 or 80,"


class HostRules(TransportSecurityMiddleware):
    """The rules of one node.

    Args:
        hosts: what ``Host`` may say, as ``host`` or ``host:*``; None for anything.
        origins: what ``Origin`` may say where there is one, the same way; None for anything.
    """

    def __init__(self, hosts: Collection[str] | None, origins: Collection[str] | None) -> None:
        super().__init__(
            TransportSecuritySettings(
                enable_dns_rebinding_protection=hosts is not None or origins is not None,
                allowed_hosts=list(hosts or ()),
                allowed_origins=list(origins or ()),
            )
        )
        self._hosts, self._origins = hosts, origins
        self._said: set[str] = set()

    async def validate_request(self, request: Request, is_post: bool = False) -> Response | None:
        """The answer to a request that may not come in; None for one that may."""
        headers = request.headers
        if is_post and not headers.get("content-type", "").lower().startswith("application/json"):
            return Response("Invalid Content-Type header", status_code=400)
        if self._hosts is not None and not listed(headers.get("host", ""), self._hosts):
            return self._refused("Host", 421, "hosts", "under that name", PORTS)
        origin = headers.get("origin")
        if self._origins is not None and origin and not listed(origin, self._origins):
            return self._refused("Origin", 403, "origins", "pages of that origin", "the pages that may call it")
        return None

    def _refused(self, header: str, status: int, which: str, what: str, wanted: str) -> Response:
        """The refusal: it says what to set, and so does the log, once."""
        where = f"--allowed-{which} (PGMCP_ALLOWED_{which.upper()}), or allowed_{which}= of pgmcp.Cluster"
        if header not in self._said:
            self._said.add(header)
            logger.warning(
                "a request was refused with %d, since its %s is not listed: list %s in %s",
                status,
                header,
                wanted,
                where,
            )
        text = f"Invalid {header} header: this server does not answer {what}. Its operator lists {wanted} in {where}."
        return Response(text, status)


def host_rules(settings: Settings) -> HostRules:
    """What the operator lists, or the default."""
    hosts: Sequence[str] | None = settings.allowed_hosts or None
    origins: Sequence[str] | None = settings.allowed_origins or None
    if settings.host in LOOPBACK:
        hosts = hosts or [name + port for name in NAMES for port in ("", ":*")]
        origins = origins or [f"http://{name}{port}" for name in NAMES for port in ("", ":*")]
    elif hosts is not None or settings.cors_origins:
        origins = origins or ()
    if origins is not None:
        origins = None if ANY in settings.cors_origins else [*origins, *settings.cors_origins]
    return HostRules(hosts, origins)


def unprotected(settings: Settings) -> str | None:
    """What to tell the operator of a node that answers under any name and to any web page; None for another one."""
    if settings.host in LOOPBACK and ANY in settings.cors_origins:
        return (
            "any web page that somebody on this machine opens may call this node and read its answers "
            "(--cors-origins *): list the pages that may"
        )
    pages = settings.allowed_origins or (settings.cors_origins and ANY not in settings.cors_origins)
    if settings.host in LOOPBACK or settings.allowed_hosts or pages:
        return None
    return (
        f"this node listens on {settings.host} and answers under any name, to any web page: give it the names that "
        "clients use (--allowed-hosts mcp.example.com) and the pages that may call it (--allowed-origins)"
    )


def listed(value: str, allowed: Collection[str]) -> bool:
    """Whether a host or an origin is one of those, which may leave the port open (``:*``)."""
    if value in allowed:
        return True
    name, _, port = value.rpartition(":")
    return port.isascii() and port.isdigit() and f"{name}:{ANY}" in allowed
