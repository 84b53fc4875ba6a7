"""The tables of a cluster in memory: one shared "database" with a clock that a test can move, and take away.

Each statement runs in one go, as if it had locked all that it touches; what a test can shape is when a statement
arrives, and whether its reply does (see ``wire``).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from pgmcp.clock import Clock
from pgmcp.settings import Settings
from pgmcp.types import (
    JUMP,
    Established,
    Message,
    NodeId,
    NodeState,
    Outcome,
    Ownership,
    Principal,
    Publication,
    RequestKey,
    SessionFacts,
    SessionKey,
    StreamId,
    StreamKind,
)

LIVING = frozenset({NodeState.JOINING, NodeState.READY, NodeState.DRAINING})


@dataclass(slots=True)
class NodeRow:
    node: NodeId
    state: NodeState
    renewed_at: float
    expires_at: float
    line: int | None = None
    cause: str | None = None


@dataclass(slots=True)
class SessionRow:
    id: SessionKey
    session_id: str
    owner: NodeId
    principal: Principal
    transport: str
    epoch: int = 1
    restores: int = 0
    settled: Established | None = None
    version: int = 0
    created_at: float = 0.0
    address: str | None = None

    @property
    def ownership(self) -> Ownership:
        return Ownership(self.id, self.epoch)


@dataclass(slots=True)
class StreamRow:
    id: StreamId
    session: SessionKey
    kind: StreamKind
    sink: NodeId | None = None
    unfinished: int = 0
    next_seq: int = 1
    sink_epoch: int = 1
    delivered_seq: int = 0
    floor_seq: int = 0
    closed: bool = False
    replaced_at: list[float] = field(default_factory=list)
    events: dict[int, tuple[bytes, str | None]] = field(default_factory=dict)


@dataclass(slots=True)
class RequestRow:
    position: int
    session: SessionKey
    message: Message
    open: bool
    accepted_at: float
    claim: UUID | None = None
    claimed_epoch: int | None = None
    runs: int = 0
    outcome: Outcome | None = None
    finished_at: float = 0.0

    @property
    def key(self) -> RequestKey:
        return self.message.key

    @property
    def finished(self) -> bool:
        return self.outcome is not None


@dataclass(slots=True)
class PublicationRow:
    key: UUID
    publication: Publication
    published_at: float


@dataclass(slots=True)
class Standby:
    """What a standby has received of a primary: every commit up to some moment, and none after it."""

    primary: int
    tables: dict[str, Any]


TABLES = (
    "nodes", "sessions", "streams", "requests", "journal", "publications", "ended", "unflushed", "numbers", "positions",
)  # fmt: skip
"""What is replicated."""

PACED_SECONDS = 10.0
"""Seconds for which statements take their time after a failover."""


def _nothing(*_: object) -> None:
    return None


class MemoryCluster:
    """What all nodes share.

    Args:
        clock: physical time; a database's own time stands ``shift`` seconds from it.
    """

    def __init__(self, clock: Clock, settings: Settings) -> None:
        self.clock, self.settings = clock, settings
        self.shift, self.away = 1e9, False
        self.nodes: dict[NodeId, NodeRow] = {}
        self.sessions: dict[SessionKey, SessionRow] = {}
        self.streams: dict[StreamId, StreamRow] = {}
        self.requests: dict[RequestKey, RequestRow] = {}
        self.journal: dict[tuple[SessionKey, str, str], bytes] = {}
        self.publications: list[PublicationRow] = []
        self.ended: set[str] = set()
        self.unflushed: list[RequestRow] = []
        """Requests whose claims a crash forgets: nothing that somebody waited for has been written since."""
        self.takeovers: list[tuple[SessionKey, NodeId, NodeId, int, str]] = []
        self.lines: dict[int, Callable[[str], None]] = {}
        """The backends of the nodes' lines, and who hears what is notified there."""
        self.channels: dict[NodeId, int] = {}
        self.numbers = self.positions = 0
        """The last of the sessions' keys, and of the requests' positions."""
        self._lines = itertools.count(1)
        self.primary = self.term = 0
        """Which server takes the nodes' connections, and how many terms have begun."""
        self._paces: Iterator[float] = iter(())
        self._paced_until = 0.0
        self.started_at, self.term_position = self.now(), 0
        """What was accepted before that moment, or up to that position, may have been claimed."""
        self.issued: Callable[[NodeId, str], None] = _nothing
        """Called when a node sends a statement."""
        self.stored: Callable[[NodeId, str, Ownership], None] = _nothing
        """Called when a write is stored under an ownership."""
        self.owned: Callable[[NodeId, Ownership], None] = _nothing
        """Called when a session gets an owner."""
        self.died: Callable[[NodeId], None] = _nothing
        """Called when a node is declared dead."""

    def now(self) -> float:
        """The database's time."""
        return self.clock.boottime() + self.shift

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def position(self) -> int:
        self.positions += 1
        return self.positions

    def line_number(self) -> int:
        return next(self._lines)

    def lives(self, node: NodeId | None) -> bool:
        """Whether a node's row says that it is neither dead nor left."""
        return node in self.nodes and self.nodes[node].state in LIVING

    def ready(self, node: NodeId) -> bool:
        return node in self.nodes and self.nodes[node].state is NodeState.READY

    def session_called(self, session_id: str | None) -> SessionRow | None:
        return next((row for row in self.sessions.values() if row.session_id == session_id), None)

    def owned_by(self, node: NodeId, ownership: Ownership) -> SessionRow | None:
        """The fence: the session, if the ownership holds."""
        row = self.sessions.get(ownership.session)
        return row if row is not None and (row.owner, row.epoch) == (node, ownership.epoch) else None

    def streams_of(self, session: SessionKey) -> Iterator[StreamRow]:
        return (row for row in self.streams.values() if row.session == session)

    def standalone_of(self, session: SessionKey) -> StreamRow | None:
        return next((row for row in self.streams_of(session) if row.kind is StreamKind.STANDALONE), None)

    def requests_of(self, session: SessionKey) -> Iterator[RequestRow]:
        """In inbox order."""
        return (row for row in self.requests.values() if row.session == session)

    def facts(self, row: SessionRow, *, orphaned: bool) -> SessionFacts:
        version = None if row.settled is None else row.settled.protocol_version
        return SessionFacts(row.id, row.owner, row.epoch, version, orphaned)

    def change_owner(self, row: SessionRow, node: NodeId, reason: str) -> None:
        self.takeovers.append((row.id, row.owner, node, row.epoch + 1, reason))
        row.owner, row.epoch = node, row.epoch + 1
        self.owned(node, row.ownership)

    def crash(self) -> None:
        """The database crashes and comes back: claims, for whose commits nobody waits, may be forgotten."""
        self.started_at = self.now()
        self._forget_claims(0)

    def _forget_claims(self, kept: int) -> None:
        for row in self.unflushed[kept:]:
            if row.outcome in {None, Outcome.DELIVERED}:
                row.claim, row.claimed_epoch, row.runs, row.outcome = None, None, max(row.runs - 1, 0), None
        self.unflushed.clear()

    def standby(self) -> Standby:
        """A standby that receives nothing more from now on."""
        return Standby(self.primary, copy.deepcopy({name: getattr(self, name) for name in TABLES}))

    def fail_over(self, standby: Standby | None = None, *, claims: int = 0, paces: Sequence[float] = ()) -> None:
        """Promote a standby, and begin its term: no statement runs before that.

        Nodes find out with their next statements (see ``wire``).

        Args:
            standby: None for one that has all that was confirmed.
            claims: how many of those for whose commits nobody has waited it has.
            paces: seconds that statements take for a while, there and back, one after the other.
        """
        if standby is not None:
            for name, table in standby.tables.items():
                setattr(self, name, table)
        self._forget_claims(claims)
        self.primary += 1
        self._paces, self._paced_until = itertools.cycle(paces), self.clock.boottime() + PACED_SECONDS
        self.begin_term()

    def pace(self) -> float:
        """Seconds that a statement, or a reply, is on its way."""
        return next(self._paces, 0.0) if self.clock.boottime() < self._paced_until else 0.0

    def begin_term(self) -> None:
        """Another timeline, which has every commit of the former one: all numbers jump."""
        self.term += 1
        self.term_position = max((row.position for row in self.requests.values()), default=0)
        for session in self.sessions.values():
            session.epoch += JUMP
        for stream in self.streams.values():
            stream.next_seq += 0 if stream.closed else JUMP

    def forget(self, session: SessionKey) -> None:
        """A session goes with all that hangs off it."""
        row = self.sessions.pop(session, None)
        if row is not None:
            self.ended.add(row.session_id)
        self.streams = {key: row for key, row in self.streams.items() if row.session != session}
        self.requests = {key: row for key, row in self.requests.items() if row.session != session}
        self.journal = {key: body for key, body in self.journal.items() if key[0] != session}
