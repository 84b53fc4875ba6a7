"""What comes in over HTTP, checked before anything is stored.

Whatever is wrong is a ``Refusal``: an HTTP status and a JSON-RPC error without an id, as the SDK's own transport words
them. Nothing that passes here can make a statement of the store fail.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pydantic_core
from mcp_types import JSONRPCNotification, JSONRPCRequest, jsonrpc_message_adapter
from pydantic import ValidationError
from starlette.requests import Request

from pgmcp.protocol import INITIALIZE, INVALID_PARAMS, INVALID_REQUEST, PARSE_ERROR, error_of, method_of

LONGEST_ID = 2000


class Refusal(Exception):
    """The exchange ends here with this answer.

    Args:
        status: HTTP status.
        text: what is wrong and what to do.
        code: JSON-RPC error code.
        headers: further response headers.
    """

    def __init__(
        self, status: int, text: str, code: int = INVALID_REQUEST, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.code, self.headers = status, text, code, headers or {}

    @property
    def body(self) -> bytes:
        """The JSON-RPC error."""
        return json.dumps(error_of(None, self.code, self.text)).encode()


@dataclass(frozen=True, slots=True)
class Parsed:
    """One well-formed JSON-RPC message; ``rpc_id`` is the JSON text of a request's id, None for anything else."""

    body: bytes
    rpc_id: str | None
    method: str | None
    name: str | None
    params: Any


@dataclass(frozen=True, slots=True)
class Post:
    """The messages of one POST."""

    messages: tuple[Parsed, ...]
    batch: bool

    @property
    def requests(self) -> tuple[Parsed, ...]:
        """Those that want an answer."""
        return tuple(message for message in self.messages if message.rpc_id is not None)

    @property
    def stored(self) -> Post:
        """What is left to know of them once they were stored."""
        return Post(tuple(replace(each, body=b"", params=None) for each in self.messages), self.batch)

    @property
    def initialize(self) -> Parsed | None:
        """The handshake, if this POST is one."""
        return next((message for message in self.messages if message.method == INITIALIZE and message.rpc_id), None)


def parse_post(body: bytes, max_batch: int) -> Post:
    """Read the body of a POST, whose contents are known to be bounded (``json_limits``).

    Args:
        max_batch: messages that it may have.

    Raises:
        Refusal: 400 for what is no JSON, no JSON-RPC, or no batch that MCP allows.
    """
    try:
        value = pydantic_core.from_json(body)
    except ValueError as error:
        raise Refusal(400, f"Parse error: {error}", PARSE_ERROR) from None
    if not isinstance(value, list):
        return Post((_message(value, body),), batch=False)
    if not value or len(value) > max_batch:
        raise Refusal(400, f"A batch has 1 to {max_batch} messages, this one has {len(value)}")
    messages = tuple(_message(item, None) for item in value)
    ids = [message.rpc_id for message in messages if message.rpc_id is not None]
    if len(set(ids)) != len(ids):
        raise Refusal(400, "Two requests of the batch have the same id")
    if any(message.method == INITIALIZE for message in messages):
        raise Refusal(400, "initialize must not be part of a batch")
    return Post(messages, batch=True)


def _message(value: Any, body: bytes | None) -> Parsed:
    if isinstance(value, dict) and "method" in value and "id" in value and not _is_id(value["id"]):
        raise Refusal(400, f"A request's id is a string or an integer of at most {LONGEST_ID} characters")
    try:
        message = jsonrpc_message_adapter.validate_python(value, by_name=False)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        text = f"Validation error: not a JSON-RPC message ({problem['msg']})"
        raise Refusal(400, text, INVALID_PARAMS) from None
    text_body = body if body is not None else json.dumps(value, ensure_ascii=False).encode()
    if isinstance(message, JSONRPCRequest):
        return _storable(Parsed(text_body, json.dumps(message.id), message.method, _name(message), message.params))
    method = message.method if isinstance(message, JSONRPCNotification) else None
    return _storable(Parsed(text_body, None, method, None, None))


def _is_id(value: Any) -> bool:
    """MCP has no null ids and no fractions; longer ones than this are no ids but payloads."""
    if isinstance(value, str):
        return len(json.dumps(value)) <= LONGEST_ID
    return isinstance(value, int) and not isinstance(value, bool) and len(str(value)) <= LONGEST_ID


def _name(request: JSONRPCRequest) -> str | None:
    key = method_of(request.method).name
    name = (request.params or {}).get(key) if key else None
    return name if isinstance(name, str) else None


def _storable(message: Parsed) -> Parsed:
    """PostgreSQL takes neither NUL nor lone surrogates as text, and one such row would fail its whole group."""
    for text in (message.method, message.name):
        if text is not None and ("\0" in text or any("\ud800" <= char <= "\udfff" for char in text)):
            raise Refusal(400, "Method and tool names must be without NUL and lone surrogates", INVALID_PARAMS)
    return message


def accepts(request: Request) -> tuple[bool, bool]:
    """Whether the client takes JSON, and whether it takes server-sent events (RFC 9110 section 12.5.1, no weights)."""
    header = request.headers.get("accept", "")
    types = {part.split(";")[0].strip().lower() for part in header.split(",")}
    return (
        bool(types & {"*/*", "application/*", "application/json"}),
        bool(types & {"*/*", "text/*", "text/event-stream"}),
    )
