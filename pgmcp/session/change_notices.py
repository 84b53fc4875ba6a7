"""Change notices: what one session is told of publications, on its standalone stream.

Invariants:
- A session hears nothing before the end of its handshake; of resources, only those that it subscribed to.
- What waits to be told counts once for each list and resource, so that little waits however long PostgreSQL is away.
- A session that has changed its owner is told once what its owners may have heard and not told.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from pgmcp.protocol import PROMPTS_CHANGED, RESOURCE_UPDATED, RESOURCES_CHANGED, TOOLS_CHANGED, message_of
from pgmcp.session.adapter import Kind, Outgoing
from pgmcp.session.journal import subscription
from pgmcp.types import LISTS, Change, JournalEntry, Publication

logger = logging.getLogger(__name__)

_METHODS = {
    Change.TOOLS: TOOLS_CHANGED,
    Change.PROMPTS: PROMPTS_CHANGED,
    Change.RESOURCES: RESOURCES_CHANGED,
    Change.UPDATED: RESOURCE_UPDATED,
}


SOME = 100
"""Sessions that are told in one turn of the event loop."""


class ChangeNotices:
    """One session's change notices.

    Args:
        say: sends a message to the client, as if its server had said it; returns when it is stored.
    """

    def __init__(self, say: Callable[[Outgoing], Awaitable[None]]) -> None:
        self._say = say
        self._begun = False
        self._subscribed: dict[str, str] = {}
        self._waiting: dict[Publication, None] = {}
        self._telling: asyncio.Task[None] | None = None

    @property
    def subscribed(self) -> Collection[str]:
        """The keys of the subscriptions in the journal."""
        return self._subscribed.keys()

    def begin(self) -> None:
        """The handshake is over."""
        self._begun = True

    def note(self, entry: JournalEntry) -> None:
        """Something is in the journal from now on, or not any more."""
        if entry.kind == "initialized":
            self.begin()
        elif entry.kind == "subscription" and entry.body is None:
            self._subscribed.pop(entry.detail, None)
        elif entry.kind == "subscription":
            self._subscribed[entry.detail] = str(subscription(entry.body or b"{}"))

    def hear(self, publications: Sequence[Publication]) -> None:
        """Tell those that this session wants to hear of."""
        for publication in publications if self._begun else ():
            if publication.change in LISTS or publication.uri in self._subscribed.values():
                self._waiting[publication] = None
        self._tell()

    def missed(self, changed: Collection[Change]) -> None:
        """Tell once what this session may have missed: its resources, and these lists."""
        updated = (Publication(Change.UPDATED, uri) for uri in self._subscribed.values())
        self.hear([*(Publication(change) for change in sorted(changed)), *updated])

    def _tell(self) -> None:
        if self._waiting and self._telling is None:
            self._telling = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                publication = next(iter(self._waiting))
                del self._waiting[publication]
                try:
                    await self._say(_message(publication))
                except Exception:
                    logger.exception("one session was not told of a publication; it is told of the next ones")
        finally:
            self._telling = None

    def stop(self) -> None:
        """Tell nothing more."""
        self._waiting.clear()
        if self._telling is not None:
            self._telling.cancel()


async def tell(sessions: Iterable[ChangeNotices], publications: Sequence[Publication]) -> None:
    """Tell each of these sessions what it wants to hear of."""
    await _each(sessions, lambda notices: notices.hear(publications))


async def missed(sessions: Iterable[ChangeNotices], changed: Collection[Change]) -> None:
    """Tell each of these sessions what it may have missed."""
    await _each(sessions, lambda notices: notices.missed(changed))


async def _each(sessions: Iterable[ChangeNotices], do: Callable[[ChangeNotices], None]) -> None:
    for count, notices in enumerate(sessions, 1):
        do(notices)
        if count % SOME == 0:
            await asyncio.sleep(0)


def _message(publication: Publication) -> Outgoing:
    method = _METHODS[publication.change]
    message = message_of(method, None if publication.uri is None else {"uri": publication.uri})
    return Outgoing(Kind.NOTIFICATION, json.dumps(message).encode(), method=method)
