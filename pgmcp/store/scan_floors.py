"""Scan floors: below which a reader of ``requests`` need not look again, so that it never walks what is over.

While anybody holds a snapshot, no dead version of a row can be removed, and a scan walks them all. So whoever has
looked keeps a *floor*: what was not visible then was written by a transaction that had not ended, and those are few or
new. PostgreSQL's own snapshot tells which (``requests.xact`` is the transaction that inserted the row), so nothing is
passed over in whatever order transactions commit, and a neighbour that never ends costs one look-up.

The statements are written so that the planner has one way to find a row, whatever statistics say: a plan is made while
tables are small, is kept, and must not read an index from end to end when that is full of what is over. An index is
read whole for its order (of a merge join, of ``order by``), or because its partial condition is asked for. So rows are
found by ``id = any(array[...])`` or in a ``lateral (... offset 0)``, and conditions of partial indexes are asked for in
other words.

Invariant: a floor says only what was *visible*. What was visible and still matters is remembered beside it, by its id.

Failure handling: a crash forgets transactions that nobody waited for (claims), and PostgreSQL gives their ids out anew.
Floors are worth nothing then, and are cleared when the line is open again (a term has floors of its own).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

RUNNING = 32
"""Running transactions that a floor names one by one; with more of them it begins at the oldest."""

MOST = 10_000
"""ScanFloors that are kept; without one, the next look begins at the bottom."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class ScanFloor:
    """Rows whose transaction is ``low`` or later, or one of ``running``, may not have been seen.

    ``known`` are rows that were seen and still matter.
    """

    low: int = 0
    running: tuple[int, ...] = ()
    known: tuple[UUID, ...] = ()

    @classmethod
    def of(cls, snapshot: str, known: Sequence[UUID] = ()) -> ScanFloor:
        """The floor of whoever has looked with this ``pg_snapshot``."""
        oldest, end, running = snapshot.split(":")
        each = tuple(int(xact) for xact in running.split(",") if xact)
        if len(each) > RUNNING:
            return cls(int(oldest), (), tuple(known))
        return cls(int(end), each, tuple(known))

    @property
    def texts(self) -> tuple[str, str]:
        """``running`` and ``known`` as PostgreSQL's texts of arrays: one argument can hold those of many floors."""
        return f"{{{','.join(map(str, self.running))}}}", f"{{{','.join(map(str, self.known))}}}"


BOTTOM = ScanFloor()


class ScanFloors(Generic[Key]):
    """The newest floors of one reader."""

    def __init__(self) -> None:
        self._floors: dict[Key, ScanFloor] = {}

    def of(self, key: Key) -> ScanFloor:
        """The floor to look from."""
        return self._floors.get(key, BOTTOM)

    def rise(self, key: Key, before: ScanFloor, floor: ScanFloor) -> None:
        """A look from ``before`` has ended; nothing changes when that was forgotten or replaced meanwhile."""
        if self.of(key) is not before:
            return
        self._floors.pop(key, None)
        if len(self._floors) >= MOST:
            del self._floors[next(iter(self._floors))]
        self._floors[key] = floor

    def forget(self, key: Key) -> None:
        """Something below the floor may matter again: the next look begins at the bottom."""
        self._floors.pop(key, None)

    def clear(self) -> None:
        """The ids of transactions mean something else now: each next look begins at the bottom."""
        self._floors.clear()
