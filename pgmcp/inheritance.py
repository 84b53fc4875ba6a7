"""What a new owner finds of a session."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pgmcp.types import Change, JournalEntry, NodeId, RequestKey, StreamId


@dataclass(frozen=True, slots=True)
class Inherited:
    """A request that an earlier owner may have started and did not finish."""

    key: RequestKey
    position: int
    rpc_id: str
    method: str
    name: str | None
    body: bytes
    context: bytes
    stream: StreamId | None
    next_seq: int
    runs: int


@dataclass(frozen=True, slots=True)
class Heard:
    """An answer of the client (``method`` None) or one of its notifications, claimed or not, the newest first."""

    position: int
    method: str | None
    body: bytes
    claimed: bool


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a new owner finds of a session.

    ``attempt`` counts the restores that were begun and did not succeed, this one included; ``said`` holds questions,
    cancels and progress of earlier owners on the streams of ``requests`` and on the standalone one, the newest first;
    ``changed``, of which lists changes were published since the session began; ``version`` is the number of the newest
    write of its journal, and ``exported_at`` says when a server exported its memory of it.
    """

    session_id: str
    attempt: int
    standalone: StreamId
    next_seq: int
    sinks: tuple[tuple[NodeId, StreamId], ...]
    journal: tuple[JournalEntry, ...]
    requests: tuple[Inherited, ...]
    heard: tuple[Heard, ...]
    said: tuple[tuple[StreamId, bytes], ...]
    changed: tuple[Change, ...] = ()
    version: int = 0
    exported_at: datetime | None = None
