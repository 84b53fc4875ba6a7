"""What becomes of a request that an earlier owner may have started (G5).

What was claimed and not finished may have run. It runs once more only if that does no harm: methods that only read or
set, tools that say so of themselves, tools that the operator named; and at most twice in all, so that a request that
takes its node down does so to two. Everything else ends with an error that says that the outcome is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase

from pgmcp.inheritance import Heard, Inherited
from pgmcp.protocol import CALL_TOOL, CANCELLED, HARMLESS

RUNS = 2
"""Times that a request is started at most."""


class Fate(StrEnum):
    """What the new owner does with an inherited request."""

    AGAIN = "again"
    CANCELLED = "cancelled"
    LOST = "lost"


def undecided(requests: Sequence[Inherited], patterns: Sequence[str]) -> bool:
    """Whether a fate depends on what the server says of its tools."""
    return any(
        request.method == CALL_TOOL and request.runs < RUNS and not _named(request, patterns) for request in requests
    )


def fate(request: Inherited, heard: Sequence[Heard], patterns: Sequence[str], harmless: Collection[str]) -> Fate:
    """Decide.

    Args:
        request: what an earlier owner may have started.
        heard: what the client has said since.
        patterns: tools that the operator allows to run again.
        harmless: tools that say of themselves that they read only, or may be repeated.
    """
    if any(_cancels(said, request) for said in heard):
        return Fate.CANCELLED
    if max(request.runs, 1) >= RUNS:
        return Fate.LOST
    if request.method == CALL_TOOL:
        return Fate.AGAIN if _named(request, patterns) or request.name in harmless else Fate.LOST
    return Fate.AGAIN if request.method in HARMLESS else Fate.LOST


def _named(request: Inherited, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(request.name or "", pattern) for pattern in patterns)


def _cancels(said: Heard, request: Inherited) -> bool:
    """A cancel that was claimed may not have been obeyed; one from before the request means another request."""
    if said.method != CANCELLED or said.position < request.position:
        return False
    return json.dumps((json.loads(said.body).get("params") or {}).get("requestId")) == request.rpc_id
