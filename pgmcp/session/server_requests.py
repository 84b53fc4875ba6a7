"""Requests of the server to the client: their ids on the wire.

An actor's questions start at 1 again after every restore. On the wire each carries a number that was drawn for this
actor, so that a late answer to a dead owner's question can never answer a new owner's (the two dialogs look alike to
the SDK: "open the window?" - "delete all?" - "yes"). Wire ids stay below 2**53, for clients in JavaScript.
"""

from __future__ import annotations

import json
from typing import Any

from pgmcp.clock import Ids

ACTORS = 900_000_000
STEP = 10_000_000


class ServerRequests:
    """The open questions of one actor."""

    def __init__(self, ids: Ids) -> None:
        self._base = (1 + ids.number(ACTORS - 1)) * STEP
        self._count = 0
        self._open: dict[int, Any] = {}

    def ask(self, message: bytes) -> bytes:
        """Give a server request its wire id; a progress token that repeats the id goes along."""
        request = json.loads(message)
        own = request["id"]
        self._count += 1
        wire = self._base + self._count % STEP
        self._open[wire] = own
        request["id"] = wire
        meta = (request.get("params") or {}).get("_meta") or {}
        if meta.get("progressToken") == own:
            meta["progressToken"] = wire
        return dump(request)

    def cancel(self, message: bytes) -> bytes | None:
        """Translate the server's own ``notifications/cancelled``; None when the question is not open."""
        notification = json.loads(message)
        own = notification["params"].get("requestId")
        wire = next((wire for wire, known in self._open.items() if known == own), None)
        if wire is None:
            return None
        del self._open[wire]
        notification["params"]["requestId"] = wire
        return dump(notification)

    def answer(self, response: dict[str, Any]) -> bytes | None:
        """Translate a client's answer; None when nobody here asked."""
        wire = response.get("id")
        if not isinstance(wire, int) or wire not in self._open:
            return None
        return dump(response | {"id": self._open.pop(wire)})

    def progress(self, notification: dict[str, Any]) -> bytes | None:
        """Translate a client's progress on a question; None when it is about none of ours."""
        params = notification.get("params") or {}
        wire = params.get("progressToken")
        if not isinstance(wire, int) or wire not in self._open:
            return None
        return dump(notification | {"params": params | {"progressToken": self._open[wire]}})


def dump(message: dict[str, Any]) -> bytes:
    """JSON as it goes into the tables."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
