"""The facts of MCP: what its revisions can, what its methods are, the numbers and names of its messages.

Whatever pgmcp decides by a revision, a method, an error code or a header is looked up here, so a new rule of the
protocol begins here. Two statements say methods again, in SQL: ``inherited_heard`` and ``inherited_said``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SESSION_ID_HEADER = "mcp-session-id"
LAST_EVENT_ID_HEADER = "last-event-id"
VERSION_HEADER = "mcp-protocol-version"
METHOD_HEADER = "mcp-method"
HEADER_PREFIX = "mcp-"
"""What the name of a header of MCP's own begins with."""

PARSE_ERROR, INVALID_REQUEST, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32602, -32603
REQUEST_CANCELLED = -32800
UNSUPPORTED_VERSION = -32022

INITIALIZE, INITIALIZED = "initialize", "notifications/initialized"
CANCELLED, PROGRESS = "notifications/cancelled", "notifications/progress"
CALL_TOOL, LIST_TOOLS = "tools/call", "tools/list"
SUBSCRIBE, UNSUBSCRIBE, LISTEN = "resources/subscribe", "resources/unsubscribe", "subscriptions/listen"
TOOLS_CHANGED = "notifications/tools/list_changed"
PROMPTS_CHANGED = "notifications/prompts/list_changed"
RESOURCES_CHANGED = "notifications/resources/list_changed"
RESOURCE_UPDATED = "notifications/resources/updated"


@dataclass(frozen=True, slots=True)
class Revision:
    """What a revision has, as far as pgmcp goes by it; of one that nobody knows nothing is taken for granted.

    ``handshake``: it begins with ``initialize``, and its exchanges belong to sessions. ``batches``: one POST may have
    several messages. ``resumes``: its clients know priming events, and come back when a connection ends before its
    stream.
    """

    handshake: bool = False
    batches: bool = False
    resumes: bool = False


REVISIONS = {
    "2024-11-05": Revision(handshake=True),
    "2025-03-26": Revision(handshake=True, batches=True),
    "2025-06-18": Revision(handshake=True),
    "2025-11-25": Revision(handshake=True, resumes=True),
    "2026-07-28": Revision(resumes=True),
}

ASSUMED = "2025-03-26"
"""The revision of a request that names none."""

BATCHING = " and ".join(name for name, revision in REVISIONS.items() if revision.batches)
"""The revisions that have batches, for people."""


class Coalescing(StrEnum):
    """What a notification gives way to while it waits on the standalone stream and nobody fetches it."""

    NOTHING = "nothing"
    ROOM = "room"
    """To whatever is newer, once too many wait."""
    METHOD = "method"
    """To the next one of its method."""
    URI = "uri"
    """To the next one of its method about the same resource."""


@dataclass(frozen=True, slots=True)
class Method:
    """What a method is; one that nobody knows may have effects.

    ``harmless``: it may run once more when nobody knows whether it has run (of ``tools/call`` each tool says so).
    ``name``: the parameter by which its requests are named (``Mcp-Name``). ``journal``: as what it is kept to rebuild a
    session from. ``gives_way``: to what, as a notification of the server.
    """

    harmless: bool = False
    name: str | None = None
    journal: str | None = None
    gives_way: Coalescing = Coalescing.ROOM


METHODS = {
    INITIALIZE: Method(harmless=True, journal="initialize"),
    INITIALIZED: Method(journal="initialized"),
    CANCELLED: Method(gives_way=Coalescing.NOTHING),
    PROGRESS: Method(),
    "ping": Method(harmless=True),
    "completion/complete": Method(harmless=True),
    "logging/setLevel": Method(harmless=True, journal="level"),
    "prompts/get": Method(harmless=True, name="name"),
    "prompts/list": Method(harmless=True),
    PROMPTS_CHANGED: Method(gives_way=Coalescing.METHOD),
    "resources/list": Method(harmless=True),
    "resources/read": Method(harmless=True, name="uri"),
    SUBSCRIBE: Method(harmless=True, journal="subscription"),
    "resources/templates/list": Method(harmless=True),
    UNSUBSCRIBE: Method(harmless=True, journal="subscription"),
    RESOURCES_CHANGED: Method(gives_way=Coalescing.METHOD),
    RESOURCE_UPDATED: Method(gives_way=Coalescing.URI),
    CALL_TOOL: Method(name="name"),
    LIST_TOOLS: Method(harmless=True),
    TOOLS_CHANGED: Method(gives_way=Coalescing.METHOD),
}

HARMLESS = frozenset(name for name, method in METHODS.items() if method.harmless)


def revision_of(version: str | None) -> Revision:
    """What the revision of that name has; None for a session whose handshake has settled none yet."""
    return REVISIONS.get(version or "", Revision())


def method_of(name: str | None) -> Method:
    """What the method of that name is; any list that has changed is coalesced, whoever thought of it."""
    unknown = Method(gives_way=Coalescing.METHOD) if name is not None and name.endswith("/list_changed") else Method()
    return METHODS.get(name or "", unknown)


def error_of(rpc_id: str | None, code: int, text: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON-RPC error that ends a request.

    Args:
        rpc_id: the JSON text of the request's id; None for what is no request, or cannot be read.
        data: what programs may go by.
    """
    error: dict[str, Any] = {"code": code, "message": text}
    if data is not None:
        error["data"] = data
    return {"jsonrpc": "2.0", "id": None if rpc_id is None else json.loads(rpc_id), "error": error}


def message_of(method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON-RPC notification, or a request that has no id yet."""
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    return message if params is None else message | {"params": params}
