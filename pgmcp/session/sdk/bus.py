"""The cluster's ``SubscriptionBus`` for servers of the official SDK (mcp 2.x).

What a server publishes is stored for every node; what any node (or SQL) has published comes back and goes to the
listeners of this process, the ``subscriptions/listen`` streams that it serves. Sessions of earlier revisions hear the
same without the bus (``session/change_notices.py``).

Invariants:
- A publisher's own process hears of its events as every other one does: when they are stored.
- After a gap each stream is told once what it listens to, whether it has changed or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    ListenHandler,
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
)
from mcp_types import SubscriptionsListenRequestParams, SubscriptionsListenResult

from pgmcp.errors import PublicationRefused
from pgmcp.protocol import LISTEN
from pgmcp.types import Change, Publication

logger = logging.getLogger(__name__)

Listener = Callable[[ServerEvent], None]

SOME, TURNS = 16, 12
"""Listeners that are told at once, and turns of the event loop in which their streams write before the next are told:
whoever else wants something of the node waits for few of them."""

_LISTS: dict[Change, ServerEvent] = {
    Change.TOOLS: ToolsListChanged(),
    Change.PROMPTS: PromptsListChanged(),
    Change.RESOURCES: ResourcesListChanged(),
}
_wanted: ContextVar[frozenset[str] | None] = ContextVar("pgmcp_listen_uris", default=None)


class PostgresSubscriptionBus(InMemorySubscriptionBus):
    """A ``SubscriptionBus`` whose events reach the streams of every node and the sessions of earlier revisions.

    pgmcp gives one to each server that has only the SDK's own; build a server with one to publish outside of its
    handlers: ``MCPServer("name", subscriptions=bus)``. In a process that serves no node it is the SDK's in-process bus.
    """

    def __init__(self) -> None:
        super().__init__()
        self._join()

    def _join(self) -> None:
        self._spread: Callable[[Publication], Awaitable[None]] | None = None
        self._streams: dict[object, tuple[Listener, frozenset[str] | None]] = {}

    @classmethod
    def out_of(cls, bus: InMemorySubscriptionBus) -> PostgresSubscriptionBus:
        """Make the SDK's own bus one of the cluster: it stays the same object for whoever holds it, and listens."""
        bus.__class__ = cls
        made: Any = bus
        made._join()  # noqa: SLF001 - it is one of ours now
        return cast("PostgresSubscriptionBus", made)

    async def publish(self, event: ServerEvent) -> None:
        """Store an event for every node; its listeners hear of it a moment later.

        Raises:
            PublicationRefused: it is no event of ``mcp.server.subscriptions``, or its uri cannot be stored.
            DatabaseUnavailable: PostgreSQL did not take it within ``--hold`` seconds.
        """
        if self._spread is None:
            await self._spread_here(event)
        else:
            await self._spread(publication_of(event))

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Register a listener; returns what removes it."""
        token = object()
        self._streams[token] = listener, _wanted.get()

        def remove() -> None:
            self._streams.pop(token, None)

        return remove

    def attach(self, spread: Callable[[Publication], Awaitable[None]]) -> Callable[[], None]:
        """Publish through a node from now on; returns what ends that."""
        self._spread = spread

        def detach() -> None:
            if self._spread is spread:
                self._spread = None

        return detach

    async def tell(self, publications: Iterable[Publication]) -> None:
        """Tell the listeners; between two events, and between some listeners and the next, their streams get a turn."""
        for publication in publications:
            await self._spread_here(_event(publication))

    async def _spread_here(self, event: ServerEvent) -> None:
        await super().publish(event)  # to those who listened before the bus was the cluster's
        uri = event.uri if isinstance(event, ResourceUpdated) else None
        wanting = (listener for listener, uris in self._here() if uri is None or uris is None or uri in uris)
        await _paced((listener, event) for listener in wanting)

    async def missed(self) -> None:
        """Tell each listener once of everything that it may want to hear of."""
        await _paced((listener, event) for listener, _ in self._here() for event in _LISTS.values())
        await _paced((listener, ResourceUpdated(uri=uri)) for listener, uris in self._here() for uri in uris or ())

    def _here(self) -> Iterator[tuple[Listener, frozenset[str] | None]]:
        """The listeners, but for those that go while others are told."""
        for token, stream in list(self._streams.items()):
            if token in self._streams:
                yield stream


class Listen(ListenHandler):
    """A server's own handler, which tells the bus in passing which resources each stream wants to hear of."""

    def __init__(self, handler: ListenHandler) -> None:
        self.handler = handler

    async def __call__(
        self, ctx: ServerRequestContext[Any, Any], params: SubscriptionsListenRequestParams
    ) -> SubscriptionsListenResult:
        """Serve one stream."""
        _wanted.set(frozenset(params.notifications.resource_subscriptions or ()))
        return await self.handler(ctx, params)

    def close(self) -> None:
        """See ``ListenHandler.close``."""
        self.handler.close()


def bus_of(server: Server[Any], given: Any = None) -> PostgresSubscriptionBus:
    """The cluster's bus for a server, plugged in where it has only the SDK's in-process one.

    A server with a bus of its own keeps it, and one that serves no subscriptions has none: then nobody publishes to the
    one that is returned.

    Args:
        server: the low-level server.
        given: the bus that what is around it publishes to, if that has one.
    """
    entry = server.get_request_handler(LISTEN)
    handler: Any = None if entry is None else entry.handler
    own = given or getattr(getattr(handler, "handler", handler), "_bus", None)
    if own is None and handler is None:
        return PostgresSubscriptionBus()
    if not isinstance(own, PostgresSubscriptionBus):
        if type(own) is not InMemorySubscriptionBus:
            kind = type(handler if own is None else own).__name__
            logger.info("the server keeps its own subscription bus (%s): pgmcp carries nothing for it", kind)
            return PostgresSubscriptionBus()
        own = PostgresSubscriptionBus.out_of(own)
    if isinstance(handler, ListenHandler) and not isinstance(handler, Listen):
        server.add_request_handler(LISTEN, SubscriptionsListenRequestParams, Listen(handler))
    return own


def publication_of(event: ServerEvent) -> Publication:
    """An event of the SDK as the cluster stores it.

    Raises:
        PublicationRefused: it is none.
    """
    if isinstance(event, ResourceUpdated):
        return Publication(Change.UPDATED, event.uri)
    for change, listed in _LISTS.items():
        if event == listed:
            return Publication(change)
    message = f"{event!r} is no event that clients can be told of: publish those of mcp.server.subscriptions."
    raise PublicationRefused(message)


def publications_of(events: Sequence[ServerEvent]) -> list[Publication]:
    """Several events; see ``publication_of``."""
    return [publication_of(event) for event in events]


def _event(publication: Publication) -> ServerEvent:
    return _LISTS.get(publication.change) or ResourceUpdated(uri=publication.uri or "")


async def _paced(told: Iterable[tuple[Listener, ServerEvent]]) -> None:
    for count, (listener, event) in enumerate(told, 1):
        try:
            listener(event)
        except Exception:
            logger.exception("a subscription listener failed; the others go on")
        if count % SOME == 0:
            for _ in range(TURNS):
                await asyncio.sleep(0)
