"""Tails: the streams that this edge carries, and the ears of the exchanges that carry them.

An exchange subscribes before its stream can have events (a wake-up can beat the reply of the accept that opened the
stream), reads after each wake-up, and looks by itself now and then, so that a lost wake-up only delays.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pgmcp.types import SessionKey, StreamAlias, StreamId, alias_of
from pgmcp.web.admission import Guest


class Tail:
    """One exchange's ear on one stream."""

    def __init__(self, stream: StreamId) -> None:
        self.stream = stream
        self.session: SessionKey | None = None
        self.moved = asyncio.Event()
        self.ended = self.leaving = self.cut = False
        self.patient = False
        """Whether its client could not go on elsewhere, so that a leaving node waits for it."""

    @property
    def over(self) -> bool:
        """Whether the exchange has to end: its session is over, or its node leaves."""
        return self.ended or self.cut or (self.leaving and not self.patient)


class Tails:
    """All tails of one incarnation of a node."""

    def __init__(self) -> None:
        self._by_stream: dict[StreamAlias, set[Tail]] = {}
        self._by_session: dict[SessionKey, set[Tail]] = {}
        self._posts: Counter[tuple[Guest, str]] = Counter()
        self._leaving = False

    def __len__(self) -> int:
        return sum(len(tails) for tails in self._by_stream.values())

    def __iter__(self) -> Iterator[Tail]:
        return (tail for tails in list(self._by_stream.values()) for tail in list(tails))

    def newest(self, count: int) -> list[Tail]:
        """The tails of the ``count`` streams that were subscribed to last."""
        streams = itertools.islice(reversed(self._by_stream.values()), count)
        return [tail for tails in streams for tail in tails]

    @contextmanager
    def subscribe(self, stream: StreamId) -> Iterator[Tail]:
        """Hear of a stream for as long as the context lasts."""
        tail = Tail(stream)
        if self._leaving:
            tail.leaving = True
            tail.moved.set()  # it ends before it has begun, and goes on elsewhere
        alias = alias_of(stream)
        self._by_stream.setdefault(alias, set()).add(tail)
        try:
            yield tail
        finally:
            tails = self._by_stream[alias]
            tails.discard(tail)
            if not tails:
                del self._by_stream[alias]
            self._leave_session(tail)

    def hears(self, stream: StreamId) -> bool:
        """Whether an exchange here carries, or is about to carry, a stream."""
        return alias_of(stream) in self._by_stream

    def has(self, session: SessionKey) -> bool:
        """Whether an exchange here carries a stream of a session."""
        return session in self._by_session

    def belongs(self, tail: Tail, session: SessionKey) -> None:
        """Note which session the stream of a tail is of, when that is known."""
        self._leave_session(tail)
        tail.session = session
        self._by_session.setdefault(session, set()).add(tail)

    def _leave_session(self, tail: Tail) -> None:
        if tail.session is not None:
            tails = self._by_session[tail.session]
            tails.discard(tail)
            if not tails:
                del self._by_session[tail.session]

    @contextmanager
    def post(self, caller: Guest, session_id: str, most: int) -> Iterator[bool]:
        """Count a session's POST as one of its open streams here; False when it has ``most`` of them.

        They count for the caller who sent them: whether the session is his, nobody knows yet.
        """
        key = caller, session_id
        self._posts[key] += 1
        try:
            yield self._posts[key] <= most
        finally:
            self._posts[key] -= 1
            if not self._posts[key]:
                del self._posts[key]

    def wake(self, streams: Iterable[StreamAlias]) -> None:
        """These streams have moved."""
        for stream in streams:
            for tail in self._by_stream.get(stream, ()):
                tail.moved.set()

    def end(self, sessions: frozenset[SessionKey]) -> None:
        """End the exchanges of sessions that are over."""
        for session in sessions:
            for tail in self._by_session.get(session, ()):
                tail.ended = True
                tail.moved.set()

    @property
    def patient(self) -> int:
        """Exchanges whose clients could not go on elsewhere."""
        return sum(tail.patient for tail in self)

    def leave(self, *, at_once: bool) -> None:
        """End every exchange, from now on: the node leaves, and clients go on elsewhere.

        Args:
            at_once: also those whose clients could not; else they end with their answer.
        """
        self._leaving = True
        for tail in self:
            tail.leaving, tail.cut = True, at_once
            tail.moved.set()
