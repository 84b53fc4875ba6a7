"""The journal: the messages from which a session's actor can be rebuilt.

It keeps the handshake with its result, the last log level and the live subscriptions; replayed in order into a fresh
server session they bring back all that the server knows of its client.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from pgmcp.protocol import INITIALIZE, SUBSCRIBE, UNSUBSCRIBE, method_of
from pgmcp.types import Established, JournalEntry

_LABEL = 200
"""Characters of a client's name or version that are kept; they are labels for operators."""


def journal_entries(method: str, body: bytes, result: bytes | None) -> list[JournalEntry]:
    """What a message that the server has taken changes in the journal."""
    kind = method_of(method).journal
    if kind is None:
        return []
    if method == INITIALIZE:
        return [] if result is None else [JournalEntry(kind, "", body), JournalEntry("result", "", result)]
    if method in {SUBSCRIBE, UNSUBSCRIBE}:
        uri = json.dumps(subscription(body))
        detail = sha256(uri.encode()).hexdigest()  # only a key, and any URI may be longer than a key
        return [JournalEntry(kind, detail, body if method == SUBSCRIBE else None)]
    return [JournalEntry(kind, "", body)]


def subscription(body: bytes) -> object:
    """The uri that a ``resources/subscribe`` or ``resources/unsubscribe`` names."""
    return (json.loads(body).get("params") or {}).get("uri")


def handshake(body: bytes, answer: bytes) -> Established:
    """What ``initialize`` and its answer settled."""
    params: dict[str, Any] = json.loads(body).get("params") or {}
    client = params.get("clientInfo") or {}
    return Established(
        protocol_version=str(json.loads(answer)["result"].get("protocolVersion", "")),
        client_name=_label(client.get("name")),
        client_version=_label(client.get("version")),
        capabilities=json.dumps(params.get("capabilities") or {}).encode(),
    )


def _label(text: object) -> str:
    """A client's string for a text column: PostgreSQL takes neither NUL nor lone surrogates."""
    clean = str(text or "").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return clean.encode("utf-8", "replace").decode("utf-8")[:_LABEL]
