"""What becomes of a POST when the session has requests with its ids already.

A repeat is the same POST: the same messages, however they are ordered, and no others. It joins the first one or gets
its answers, all or none (G5). What only shares some requests with an earlier POST cannot join it, for a stream carries
the answers of one POST; nor may it run what is the same once more, while nobody has got the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from pgmcp.errors import DuplicateRequest
from pgmcp.types import RequestKey, StreamId


@dataclass(frozen=True, slots=True)
class Known:
    """An open request that has the id of one of the POST's."""

    key: RequestKey
    stream: StreamId | None
    same: bool
    """Whether the bodies are the same, too."""
    finished: bool
    attached: bool
    """Whether an edge carries its stream."""
    whole: bool
    """Whether the POST is the same, message for message."""


class Fate(Enum):
    """What is to be done with the POST."""

    JOIN = auto()
    WAIT = auto()
    FREE = auto()


def fate(known: Sequence[Known], *, patient: bool) -> Fate:
    """What becomes of a POST of which some ids are in use.

    Args:
        known: the requests that have them; one at least.
        patient: whether the end of an exchange may still be waited for: its client has its answers, and reuses the id.

    Returns:
        ``JOIN`` the first one's stream, ``WAIT`` and look again, or ``FREE`` the ids of requests that are over.

    Raises:
        DuplicateRequest: nothing of the POST may be stored.
    """
    if patient and all(each.finished for each in known) and any(each.attached for each in known):
        return Fate.WAIT
    if known[0].whole:
        return Fate.JOIN
    if not all(each.finished for each in known):
        message = "A request with this id is still running; use another id, or repeat its POST as it was."
        raise DuplicateRequest(message)
    if any(each.same for each in known):
        message = "This request was answered in another POST; use another id, or repeat that POST as it was."
        raise DuplicateRequest(message)
    return Fate.FREE
