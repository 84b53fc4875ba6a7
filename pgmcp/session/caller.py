"""The caller: the HTTP exchange that brought a message, on its way from the edge to the server's handler.

It is sealed while it lies in the inbox (headers carry tokens), bound to its session and message, and never logged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pgmcp.types import RequestKey


@dataclass(frozen=True, slots=True)
class Caller:
    """What the owner learns of one exchange: the adapter's description, and whether its stream can carry questions."""

    context: Mapping[str, Any] | None
    can_ask: bool = True

    def pack(self) -> bytes:
        """As bytes to seal."""
        return json.dumps({"context": self.context, "ask": self.can_ask}, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> Caller:
        """From bytes that were sealed."""
        values = json.loads(packed)
        return cls(values["context"], values["ask"])


def place(session_id: str, key: RequestKey) -> bytes:
    """Where a sealed caller belongs: it opens in no other session and for no other message."""
    return f"{session_id}/{key.hex}".encode()
