"""The outbox: what an actor writes, with its streams, the numbers that it gives out, and what is being stored.

Invariants:
- Numbers of a stream have no gap, but for the jump at the begin of a term; they are given out in the order of writing.
- What is being stored when a term begins gets its number anew, unless the former timeline had it in time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pgmcp.session.running_requests import Stream
from pgmcp.types import Outcome, RequestKey, Stand, StreamId


@dataclass(eq=False, slots=True)
class PendingEvent:
    """An event that is being stored; ``stored`` when that is known without asking again."""

    stream: Stream
    seq: int
    message: bytes
    finishes: RequestKey | None
    outcome: Outcome | None
    topic: str | None
    stored: bool = False


class Outbox:
    """The streams of one session, as its owner knows them."""

    def __init__(self, standalone: Stream) -> None:
        self.standalone = standalone
        self.streams: dict[StreamId, Stream] = {}
        self._pending: dict[PendingEvent, None] = {}
        self._bytes = 0
        self._last: tuple[StreamId, int] | None = None

    @property
    def storing(self) -> bool:
        """Whether something is being stored."""
        return bool(self._pending)

    @property
    def waiting(self) -> tuple[int, int]:
        """How many events are being stored, and their bytes."""
        return len(self._pending), self._bytes

    def begin(
        self, stream: Stream, message: bytes, finishes: RequestKey | None, outcome: Outcome | None, topic: str | None
    ) -> PendingEvent:
        """Give an event its number."""
        pending = PendingEvent(stream, stream.next_seq, message, finishes, outcome, topic)
        stream.next_seq += 1
        self._pending[pending] = None
        self._bytes += len(message)
        return pending

    def end(self, pending: PendingEvent, *, stored: bool) -> None:
        """An event was stored, or never will be."""
        del self._pending[pending]
        self._bytes -= len(pending.message)
        if stored:
            self._last = pending.stream.id, pending.seq

    # -- another term -----------------------------------------------------------------------------------------------

    def known(self) -> set[StreamId]:
        """The streams that tell whether the database has all that was stored."""
        return {*self._each(), *([self._last[0]] if self._last else [])}

    def _each(self) -> dict[StreamId, Stream]:
        streams = [self.standalone, *self.streams.values(), *(pending.stream for pending in self._pending)]
        return {stream.id: stream for stream in streams}

    def answered(self, stands: Mapping[StreamId, Stand], jump: int) -> set[RequestKey]:
        """Requests whose answers were stored in time, though nobody heard of it."""
        return {
            pending.finishes
            for pending in self._pending
            if pending.finishes is not None and self._in_time(pending, stands, jump)
        }

    def _in_time(self, pending: PendingEvent, stands: Mapping[StreamId, Stand], jump: int) -> bool:
        stand = stands.get(pending.stream.id)
        return stand is not None and pending.seq < stand.before(jump)

    def complete(self, stands: Mapping[StreamId, Stand], jump: int) -> bool | None:
        """Whether the database has all that was stored; None if the last of it is too old to tell."""
        pending = Counter(each.stream.id for each in self._pending)
        for stream in self._each().values():
            stand = stands.get(stream.id)
            if stand is None or stand.before(jump) < stream.next_seq - pending[stream.id]:
                return False
        if self._last is None:
            return True
        stand = stands.get(self._last[0])
        return None if stand is None else stand.before(jump) > self._last[1]

    def go_on(self, stands: Mapping[StreamId, Stand], jump: int) -> None:
        """Go on with the numbers of another term."""
        for pending in self._pending:
            pending.stored = pending.stored or self._in_time(pending, stands, jump)
        for stream in self._each().values():
            stream.next_seq = stands[stream.id].next_seq
        for pending in self._pending:
            if not pending.stored:
                pending.seq = pending.stream.next_seq
                pending.stream.next_seq += 1
