"""Open streams: those that this edge carries, and what the exchanges that carry them hear of them.

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
from pgmcp.web.admission import Caller


class OpenStream:
    """What one exchange hears of the stream that it carries."""

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


class OpenStreams:
    """All open streams of one incarnation of a node."""

    def __init__(self) -> None:
        self._by_stream: dict[StreamAlias, set[OpenStream]] = {}
        self._by_session: dict[SessionKey, set[OpenStream]] = {}
        self._posts: Counter[tuple[Caller, str]] = Counter()
        self._leaving = False

    def __len__(self) -> int:
        return sum(len(open_streams) for open_streams in self._by_stream.values())

    def __iter__(self) -> Iterator[OpenStream]:
        return (open_stream for open_streams in list(self._by_stream.values()) for open_stream in list(open_streams))

    def newest(self, count: int) -> list[OpenStream]:
        """Those of the ``count`` streams that were subscribed to last."""
        streams = itertools.islice(reversed(self._by_stream.values()), count)
        return [open_stream for open_streams in streams for open_stream in open_streams]

    @contextmanager
    def subscribe(self, stream: StreamId) -> Iterator[OpenStream]:
        """Hear of a stream for as long as the context lasts."""
        open_stream = OpenStream(stream)
        if self._leaving:
            open_stream.leaving = True
            open_stream.moved.set()  # it ends before it has begun, and goes on elsewhere
        alias = alias_of(stream)
        self._by_stream.setdefault(alias, set()).add(open_stream)
        try:
            yield open_stream
        finally:
            open_streams = self._by_stream[alias]
            open_streams.discard(open_stream)
            if not open_streams:
                del self._by_stream[alias]
            self._leave_session(open_stream)

    def hears(self, stream: StreamId) -> bool:
        """Whether an exchange here carries, or is about to carry, a stream."""
        return alias_of(stream) in self._by_stream

    def has(self, session: SessionKey) -> bool:
        """Whether an exchange here carries a stream of a session."""
        return session in self._by_session

    def belongs(self, open_stream: OpenStream, session: SessionKey) -> None:
        """Note which session the stream is of, when that is known."""
        self._leave_session(open_stream)
        open_stream.session = session
        self._by_session.setdefault(session, set()).add(open_stream)

    def _leave_session(self, open_stream: OpenStream) -> None:
        if open_stream.session is not None:
            open_streams = self._by_session[open_stream.session]
            open_streams.discard(open_stream)
            if not open_streams:
                del self._by_session[open_stream.session]

    @contextmanager
    def post(self, caller: Caller, session_id: str, most: int) -> Iterator[bool]:
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
            for open_stream in self._by_stream.get(stream, ()):
                open_stream.moved.set()

    def end(self, sessions: frozenset[SessionKey]) -> None:
        """End the exchanges of sessions that are over."""
        for session in sessions:
            for open_stream in self._by_session.get(session, ()):
                open_stream.ended = True
                open_stream.moved.set()

    @property
    def patient(self) -> int:
        """Exchanges whose clients could not go on elsewhere."""
        return sum(open_stream.patient for open_stream in self)

    def leave(self, *, at_once: bool) -> None:
        """End every exchange, from now on: the node leaves, and clients go on elsewhere.

        Args:
            at_once: also those whose clients could not; else they end with their answer.
        """
        self._leaving = True
        for open_stream in self:
            open_stream.leaving, open_stream.cut = True, at_once
            open_stream.moved.set()
