"""Wake-ups: ids only, meaning "look at the tables".

Invariants:
- Nothing in them resumes or addresses anything: streams go by their aliases (G8). Nodes of a build that does not know
  those, which can only be there while a newer one takes their place, are told the streams' ids.
- At most one NOTIFY of a node is in flight; what arrives meanwhile goes with the next, without a timer.
- A dirty id stays dirty until the NOTIFY that carried it succeeded.
- A payload fits PostgreSQL's 7,999 bytes; where it would not, ``*`` says "read everything again".

- What is heard may come from anybody who may connect to the database: it only ever causes a look at the tables.

Failure handling: a lost wake-up delays a message until the next poll, and never loses it. While the database is away
dirty ids are kept, at most ``MAX_DIRTY`` for a node, then they turn into ``*``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from pgmcp.clock import Clock
from pgmcp.errors import PgmcpError
from pgmcp.ports import Notifier
from pgmcp.service import Service
from pgmcp.types import PUBLISHED, NodeId, Ownership, SessionKey, StreamAlias, StreamId, Wake, alias_of, knows_aliases

EVERYTHING, ORPHANS = "*", "o"
_SESSION, _STREAM = re.compile("[ie]([0-9]{1,19})"), re.compile("[st][0-9a-f]{32}")
_HANDED = re.compile("h([0-9]{1,19})[.]([0-9]{1,19})")
_BEYOND = 2**63
"""What PostgreSQL's numbers are less than."""

PAYLOAD_BYTES = 7_900
MAX_DIRTY = 10_000
RETRY_SECONDS = 0.2
LAST_SECONDS = 1.0
"""Seconds that the last wake-ups of a leaving node may take."""


@dataclass(slots=True)
class _Dirty:
    words: dict[str, None] = field(default_factory=dict)

    def add(self, word: str) -> None:
        if EVERYTHING in self.words:
            return
        if word == EVERYTHING or len(self.words) >= MAX_DIRTY:
            self.words.clear()
            word = EVERYTHING
        self.words[word] = None

    def payload(self) -> str:
        text = ",".join(self.words)
        return text if len(text) <= PAYLOAD_BYTES else EVERYTHING


class Wakeups(Service):
    """A node's outgoing wake-ups.

    Args:
        node: this node; what is meant for itself never leaves the process.
        notifier: carries payloads to other nodes.
        wake_self: called with what this node tells itself.
    """

    def __init__(self, node: NodeId, notifier: Notifier, clock: Clock, wake_self: Callable[[Wake], None]) -> None:
        self._node, self._notifier, self._clock, self._wake_self = node, notifier, clock, wake_self
        self._dirty: dict[NodeId | None, _Dirty] = {}
        self._marked = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Words that were not sent yet."""
        return sum(len(dirty.words) for dirty in self._dirty.values())

    def inbox(self, node: NodeId, session: SessionKey) -> None:
        """Tell an owner that a session's inbox has messages."""
        if node == self._node:
            self._wake_self(Wake(inboxes=frozenset({session})))
        else:
            self._mark(node, f"i{session}")

    def stream(self, node: NodeId, stream: StreamId) -> None:
        """Tell a sink (also a former one) to look at a stream."""
        if node == self._node:
            self._wake_self(Wake(streams=frozenset({alias_of(stream)})))
        elif knows_aliases(node):
            self._mark(node, f"t{alias_of(stream)}")
        else:
            self._mark(node, f"s{stream.hex}")

    def ended(self, session: SessionKey) -> None:
        """Tell every node that a session is over."""
        self._wake_self(Wake(ended=frozenset({session})))
        self._mark(None, f"e{session}")

    def handed(self, node: NodeId, ownership: Ownership) -> None:
        """Tell a node that a session is its own now."""
        self._mark(node, f"h{ownership.session}.{ownership.epoch}")

    def orphans(self) -> None:
        """Tell every other node that there are sessions without an owner."""
        self._mark(None, ORPHANS)

    def published(self) -> None:
        """Tell every node that there are publications."""
        self._wake_self(Wake(published=True))
        self._mark(None, PUBLISHED)

    def _mark(self, node: NodeId | None, word: str) -> None:
        self._dirty.setdefault(node, _Dirty()).add(word)
        self._marked.set()

    async def run(self) -> None:
        """Send what is dirty as soon as something is, for ever."""
        while True:
            await self._marked.wait()
            self._marked.clear()
            await self._flush()

    async def _flush(self) -> None:
        while self._dirty:
            going, self._dirty = self._dirty, {}
            try:
                await self._notifier.notify([(node, dirty.payload()) for node, dirty in going.items()])
            except PgmcpError:
                self._put_back(going)
                await self._clock.sleep(RETRY_SECONDS)
            except BaseException:
                self._put_back(going)  # the last ones are sent when it stops
                raise

    def _put_back(self, going: dict[NodeId | None, _Dirty]) -> None:
        for node, dirty in going.items():
            later = self._dirty.setdefault(node, _Dirty())
            for word in dirty.words:
                later.add(word)

    async def stop(self) -> None:
        """Send what is dirty, as far as it goes within a second."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                await self._flush()


def parse(payload: str) -> Wake:
    """Read a payload, whoever has sent it; words that say nothing to this build are counted and ignored."""
    if payload == EVERYTHING:
        return Wake(everything=True)
    sessions: dict[str, set[SessionKey]] = {"i": set(), "e": set()}
    streams, handed, said = set[StreamAlias](), set[Ownership](), set[str]()
    junk = 0
    for word in payload.split(","):
        if (found := _SESSION.fullmatch(word)) and int(found[1]) < _BEYOND:
            sessions[word[0]].add(SessionKey(int(found[1])))
        elif _STREAM.fullmatch(word):
            streams.add(StreamAlias(word[1:]) if word[0] == "t" else alias_of(StreamId(UUID(word[1:]))))
        elif (found := _HANDED.fullmatch(word)) and max(int(found[1]), int(found[2])) < _BEYOND:
            handed.add(Ownership(SessionKey(int(found[1])), int(found[2])))
        elif word in {ORPHANS, PUBLISHED}:
            said.add(word)
        else:
            junk += 1
    return Wake(
        inboxes=frozenset(sessions["i"]),
        streams=frozenset(streams),
        ended=frozenset(sessions["e"]),
        handed=frozenset(handed),
        orphans=ORPHANS in said,
        published=PUBLISHED in said,
        junk=junk,
    )
