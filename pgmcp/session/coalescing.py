"""Coalescing: which notifications of the standalone stream may give way while nobody fetches them.

A list that changed twice changed; of two updates of one resource the newer one is enough. Log messages and whatever
else a server says on its own have a topic each: they keep their place until too many wait. Questions and answers have
none.
"""

from __future__ import annotations

import json
from hashlib import sha256

from pgmcp.protocol import Coalescing, method_of
from pgmcp.session.adapter import Kind, Outgoing

_LONGEST = 500


def topic_of(outgoing: Outgoing, seq: int) -> str | None:
    """The topic of a standalone message that will be stored as number ``seq``."""
    if outgoing.kind is not Kind.NOTIFICATION:
        return None
    match method_of(outgoing.method).gives_way:
        case Coalescing.NOTHING:
            return None
        case Coalescing.METHOD:
            return outgoing.method
        case Coalescing.URI:
            uri = json.dumps((json.loads(outgoing.message).get("params") or {}).get("uri"))
            return f"{outgoing.method} {uri if len(uri) <= _LONGEST else sha256(uri.encode()).hexdigest()}"
        case Coalescing.ROOM:
            return f"{outgoing.method} #{seq}"
