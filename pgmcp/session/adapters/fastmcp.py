"""The adapter for FastMCP 4: an SDK server inside, with surroundings of its own.

FastMCP is an extra of pgmcp: this module is imported only where a FastMCP server is served, so it is there.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastmcp import FastMCP
from fastmcp.server.context import set_transport
from fastmcp.server.providers.base import Provider
from fastmcp.utilities.versions import version_sort_key
from key_value.aio.stores.memory import MemoryStore
from mcp.server import Server
from mcp.server.subscriptions import ListenHandler
from mcp_types import SubscriptionsListenRequestParams
from starlette.types import Receive, Scope, Send

from pgmcp.clock import Clock
from pgmcp.protocol import LISTEN
from pgmcp.session.adapter import Adapted, Conversation, Shared
from pgmcp.session.adapters.sdk import SdkAdapter
from pgmcp.session.sdk.bus import Listen, PostgresSubscriptionBus, bus_of
from pgmcp.session.state import Hooks, hooks_of

logger = logging.getLogger(__name__)

FRESH_SECONDS, READ_SECONDS = 5.0, 5.0
"""Seconds after which the catalogue is read anew, and those that this may take."""


STORE = (
    "FastMCP(..., session_state_store=PostgreSQLStore(url=os.environ['PGMCP_DATABASE_URL'])), "
    "from key_value.aio.stores.postgresql"
)


class FastMcpAdapter(SdkAdapter):
    """The ``Adapter`` for a FastMCP server; its lifespan runs once per node, whatever its sessions.

    Args:
        served: the server.
        hooks: what it does with its own memory when a session moves.
    """

    def __init__(self, served: FastMCP[Any], hooks: Hooks) -> None:
        server: Server[Any] = served._mcp_server  # noqa: SLF001 - FastMCP has no public way to it
        super().__init__(server, hooks)
        self._catalogue = Catalogue(served, Clock())
        self._forgets = isinstance(getattr(served, "_state_storage", ""), MemoryStore | None)
        if server.get_tool_input_schema is None:
            server.get_tool_input_schema = self._catalogue.schema

    @asynccontextmanager
    async def _lifespan(self, shared: Shared) -> AsyncIterator[None]:
        if self._forgets:
            logger.warning(
                "what ctx.set_state stores is in one node's memory, gone after a takeover; one line keeps it in "
                "PostgreSQL: %s",
                STORE,
            )
        async with super()._lifespan(shared):
            await self._catalogue.read()
            try:
                yield
            finally:
                self._catalogue.close()

    async def converse(self, session_id: str, conversation: Conversation) -> None:
        """See ``Adapter.converse``; handlers see ``ctx.transport``, which FastMCP's own HTTP application sets."""
        set_transport("streamable-http")
        await super().converse(session_id, conversation)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``Adapter.answer``."""
        set_transport("streamable-http")
        await super().answer(scope, receive, send)


class Catalogue:
    """The input schemas of a server's tools, for the SDK to check ``Mcp-Param-*`` headers against.

    Without it the SDK lists all tools before each call of a tool. A lookup answers from memory, and has the list read
    anew when that is older than ``FRESH_SECONDS``: a tool that came just now is unknown, and not checked, for a moment.
    """

    def __init__(self, served: FastMCP[Any], clock: Clock) -> None:
        self._served, self._clock = served, clock
        self._schemas: dict[str, Mapping[str, Any]] = {}
        self._due = 0.0
        self._reading: asyncio.Task[None] | None = None

    def schema(self, name: str) -> Mapping[str, Any] | None:
        """A tool's schema; None where no such tool is known."""
        if self._clock.boottime() >= self._due and self._reading is None:
            self._reading = asyncio.create_task(self.read())
            self._reading.add_done_callback(self._read)
        return self._schemas.get(name)

    def _read(self, _: asyncio.Task[None]) -> None:
        self._reading = None

    async def read(self) -> None:
        """Read the list; what was known stays when that fails."""
        try:
            async with asyncio.timeout(READ_SECONDS):
                tools = await Provider.list_tools(self._served)  # of all callers: before what each may see
            self._schemas = {tool.name: tool.parameters for tool in sorted(tools, key=version_sort_key)}
        except Exception:
            logger.warning(
                "the list of tools could not be read; headers are checked against the one before", exc_info=True
            )
        self._due = self._clock.boottime() + FRESH_SECONDS

    def close(self) -> None:
        """Stop reading."""
        if self._reading is not None:
            self._reading.cancel()


def adapted(served: object, path: str) -> Adapted | None:
    """A ``FastMCP`` with its adapter, and with subscriptions, of which it knows nothing itself; None for anything else.

    Args:
        path: where the endpoint will be.
    """
    if not isinstance(served, FastMCP):
        return None
    whole, adapter = served.http_app(path=path), FastMcpAdapter(served, hooks_of(served))
    server: Server[Any] = served._mcp_server  # noqa: SLF001 - see above
    if server.get_request_handler(LISTEN) is None:
        server.add_request_handler(
            LISTEN, SubscriptionsListenRequestParams, Listen(ListenHandler(PostgresSubscriptionBus()))
        )
    return Adapted(_name_of(served), adapter, bus_of(server), whole)


def _name_of(served: FastMCP[Any]) -> str:
    """The server's name; one that was given none makes one up in each process (FastMCP-1a2b)."""
    kind = type(served).__name__
    return kind if re.fullmatch(rf"{re.escape(kind)}-[0-9a-f]{{4}}", served.name) else str(served.name)
