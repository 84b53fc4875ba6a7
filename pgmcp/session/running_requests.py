"""What an actor works on: the requests that are running, the streams that carry their answers, and how it may end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

from pgmcp.protocol import PROGRESS
from pgmcp.session.adapter import Outgoing
from pgmcp.types import RequestKey, StreamId


class ActorEnd(StrEnum):
    """How an actor came to its end."""

    ENDED = "its server session has ended"
    FENCED = "its ownership is over"
    OUT_OF_STEP = "what it said does not fit to the tables"


@dataclass(slots=True)
class Stream:
    """A stream as its owner knows it: the number of its next event, and how many of its requests are unfinished.

    ``said`` are the notifications of its requests that were kept, their bytes, and when the last was.
    """

    id: StreamId
    next_seq: int
    unfinished: int = 0
    said: int = 0
    said_bytes: int = 0
    said_at: float = float("-inf")


@dataclass(slots=True)
class RunningRequest:
    """A running request; ``floor`` is how far its progress was when an earlier owner ran it."""

    key: RequestKey
    method: str
    body: bytes
    stream: Stream
    can_ask: bool
    floor: float | None = None


def repeats(request: RunningRequest, outgoing: Outgoing) -> bool:
    """Whether a request that runs again says progress that its client has seen: it must only grow (MCP, "Progress")."""
    if request.floor is None or outgoing.method != PROGRESS:
        return False
    progress = (json.loads(outgoing.message).get("params") or {}).get("progress")
    return isinstance(progress, (int, float)) and progress <= request.floor
