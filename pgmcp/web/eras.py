"""The one path of both eras, of which a node may serve one only (``--eras``).

An exchange of an era that is off is answered as the newest revision says it: 400 with ``UnsupportedProtocolVersion``,
which names what is served. Clients that speak both eras go on with the other one.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pydantic_core
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pgmcp.protocol import ASSUMED, INITIALIZE, REVISIONS, UNSUPPORTED_VERSION, VERSION_HEADER, error_of
from pgmcp.web.bodies import Body
from pgmcp.web.endpoint import Front, Rules
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_limits import json_limits_of
from pgmcp.web.modern import is_modern


class Eras:
    """The endpoint of both eras.

    Args:
        modern: answers exchanges without a session.
        sessions: answers all others.
    """

    def __init__(self, modern: ASGIApp, sessions: ASGIApp) -> None:
        self._modern, self._sessions = modern, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one exchange; header values are compared with the body, so blanks around them go first."""
        if is_modern(scope):
            stripped = [(name, value.strip(b" \t")) for name, value in scope["headers"]]
            await self._modern({**scope, "headers": stripped}, receive, send)
        else:
            await self._sessions(scope, receive, send)


class EraOff(Front):
    """Refuses the exchanges of an era that is off.

    Args:
        rules: whom and what it lets in.
        legacy: whether it is the era of sessions that is served.
    """

    methods = ("POST",)

    def __init__(self, rules: Rules, *, legacy: bool) -> None:
        super().__init__(rules)
        self._supported = [name for name, revision in REVISIONS.items() if revision.handshake is legacy]

    async def take(self, exchange: HttpExchange, body: Body) -> None:
        """See ``Front.take``."""
        message: Any = None
        if body.small:
            json_limits_of(self._settings).check(body.text)
            with suppress(ValueError):
                message = pydantic_core.from_json(body.text)
        message = message if isinstance(message, dict) else {}
        named, params = exchange.header(VERSION_HEADER), message.get("params")
        if message.get("method") == INITIALIZE and isinstance(params, dict):
            named = str(params.get("protocolVersion", named))
        data = {"supported": self._supported, "requested": named or ASSUMED}
        rpc_id = message.get("id")
        known = json.dumps(rpc_id) if isinstance(rpc_id, str | int) else None
        text = f"Unsupported protocol version; this server speaks {', '.join(self._supported)}"
        error = error_of(known, UNSUPPORTED_VERSION, text, data)
        await exchange.send_response(Response(json.dumps(error), 400, media_type="application/json"))
