"""Requests without a session (2026-07-28) in the official SDK: its session manager, which answers them one by one.

The manager is given a view of the server: the same handlers, but a lifespan that was entered already (it is one for
both eras), and what the cluster shares in place of what the SDK would keep in this process.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mcp.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.subscriptions import ListenHandler
from starlette.types import Receive, Scope, Send

from pgmcp.protocol import LISTEN
from pgmcp.session.adapter import Shared
from pgmcp.session.sdk.states import with_shared_states


class Stateless:
    """One server's requests without a session.

    Args:
        server: the low-level server.
        state: what its lifespan gave.
        shared: what the cluster shares.
    """

    def __init__(self, server: Server[Any], state: Any, shared: Shared) -> None:
        self._server = view(server, state, shared)
        self._manager = StreamableHTTPSessionManager(
            self._server,
            json_response=shared.json_only,
            max_request_body_size=sys.maxsize,  # the edge has read the body, and knows its limit
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests for as long as the context lasts."""
        async with self._manager.run():
            yield

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``Adapter.answer``."""
        await self._manager.handle_request(scope, receive, send)

    def end_streams(self) -> None:
        """See ``Adapter.end_streams``."""
        entry = self._server.get_request_handler(LISTEN)
        if entry is not None and isinstance(entry.handler, ListenHandler):
            entry.handler.close()


def view(server: Server[Any], state: Any, shared: Shared) -> Server[Any]:
    """The server as the manager sees it; the server itself stays as it is."""
    seen = copy.copy(server)

    @asynccontextmanager
    async def entered(_: Server[Any]) -> AsyncIterator[Any]:
        yield state

    seen.lifespan = entered
    seen.middleware = with_shared_states(server, shared.states, once=shared.states_once)
    return seen
