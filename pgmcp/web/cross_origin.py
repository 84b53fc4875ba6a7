"""Web pages of other origins whose scripts may call a node (CORS, ``--cors-origins``).

It stands before everything else: preflights carry no token, so they are answered before anybody is asked for one, and a
page can read refusals, too. What comes from other pages goes on as if it were not there.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgmcp.settings import Settings
from pgmcp.web.hosts import ANY, listed

READABLE = ("Mcp-Session-Id", "Mcp-Protocol-Version", "WWW-Authenticate", "Retry-After")
"""Response headers that a page's script may read: the session, what to authenticate with, when to come again."""


class CrossOrigin(CORSMiddleware):
    """An ASGI application for the scripts of some pages.

    Any request header may be sent: tools may have parameters in headers of their own (``Mcp-Param-*``). Cookies are not
    taken across origins.

    Args:
        origins: the pages, as ``scheme://host``, with a port or ``:*``; ``*`` for any.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=READABLE,
            allow_private_network=ANY not in origins,
        )

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether a page is one of those."""
        return self.allow_all_origins or listed(origin, self.allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an exchange."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin")
        if origin is not None and self.is_allowed_origin(origin):
            await super().__call__(scope, receive, send)
            return

        async def varying(message: Message) -> None:
            if message["type"] == "http.response.start":  # no cache gives a listed page what lacks its header
                MutableHeaders(scope=message).add_vary_header("Origin")
            await send(message)

        await self.app(scope, receive, varying)


def cross_origin(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The application for the pages that the operator lists, if any."""
    return CrossOrigin(app, settings.cors_origins) if settings.cors_origins else app
