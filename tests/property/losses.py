"""What a failover has lost: what the promoted standby's tables lack of what the former primary had confirmed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pgmcp.types import JUMP, SessionKey, StreamId
from tests.harness.memory.tables import SessionRow

SUM = ("state", "sum")
"""Where a session's journal keeps its sum."""


@dataclass(slots=True)
class Loss:
    """Confirmed commits that are gone."""

    events: set[tuple[StreamId, int]] = field(default_factory=set)
    requests: set[str] = field(default_factory=set)
    """Ids of requests that were accepted."""
    sessions: set[str] = field(default_factory=set)
    """Sessions that were opened."""
    harmed: set[str] = field(default_factory=set)
    """Sessions of which anything is missing that decides what becomes of requests."""


Tables = Mapping[str, Any]


def loss(before: Tables, after: Tables) -> Loss:
    """Compare the former primary's tables with the standby's, before its term begins."""
    found = Loss()
    remaining = {row.session_id: row for row in after["sessions"].values()}
    for session in before["sessions"].values():
        name = session.session_id
        there = remaining.get(name)
        if there is None:
            found.sessions.add(name)
        if there is None or _told(before, session) != _told(after, there):
            found.harmed.add(name)
    found.events = _events(before) - _events(after)
    found.requests = {row.message.rpc_id for key, row in before["requests"].items() if key not in after["requests"]}
    return found


def _events(tables: Tables) -> set[tuple[StreamId, int]]:
    return {(stream.id, seq) for stream in tables["streams"].values() for seq in stream.events}


def _told(tables: Tables, session: SessionRow) -> object:
    streams = {row.id: row.next_seq for row in tables["streams"].values() if row.session == session.id}
    requests = {row.key: row.finished for row in tables["requests"].values() if row.session == session.id}
    return session.owner, session.epoch, streams, requests


def kept_sum(tables: Tables, session: SessionKey) -> int:
    """The sum that a session's journal has."""
    return int(tables["journal"].get((session, *SUM), b"0"))


def follow_each_other(numbers: list[int], terms: int) -> bool:
    """Whether a stream's numbers have no gap but for the jumps at the begin of a term."""
    return all(
        (number - before - 1) % JUMP == 0 and number - before <= 1 + terms * JUMP
        for before, number in zip([0, *numbers], numbers, strict=False)
    )
