"""The request context: the HTTP exchange that brought a message, on its way from the edge to the server's handler.

It is sealed while it lies in the inbox (headers carry tokens), bound to its session and message, and never logged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pgmcp.types import RequestKey


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the owner learns of one exchange: the adapter's description, and whether its stream can carry questions."""

    described: Mapping[str, Any] | None
    can_ask: bool = True

    def pack(self) -> bytes:
        """As bytes to seal."""
        return json.dumps({"context": self.described, "ask": self.can_ask}, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> RequestContext:
        """From bytes that were sealed."""
        values = json.loads(packed)
        return cls(values["context"], values["ask"])


def place_of_context(session_id: str, key: RequestKey) -> bytes:
    """Where a sealed context belongs: it opens in no other session and for no other message."""
    return f"{session_id}/{key.hex}".encode()
