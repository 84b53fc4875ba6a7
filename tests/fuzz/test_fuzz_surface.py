"""The HTTP surface by its OpenAPI description: schemathesis makes good and bad exchanges of it.

``GET /sse`` is not in it: its answer is a stream that never ends.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error

from tests.fuzz.conftest import Target

TEXT = {"type": "string"}
ANSWERS = {"responses": {"default": {"description": "A JSON-RPC error, or what the method asks for."}}}
MESSAGE = {
    "type": "object",
    "required": ["jsonrpc"],
    "properties": {
        "jsonrpc": {"const": "2.0"},
        "id": {"anyOf": [{"type": "integer"}, TEXT]},
        "method": {"enum": ["ping", "initialize", "tools/list", "tools/call", "notifications/cancelled"]},
        "params": {"type": "object"},
        "result": {"type": "object"},
    },
}
BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"anyOf": [MESSAGE, {"type": "array", "items": MESSAGE}]}}},
}


def parameter(name: str, place: str, values: list[str], *, required: bool = False) -> dict[str, Any]:
    schema = {"anyOf": [{"enum": values}, TEXT]}
    return {"name": name, "in": place, "required": required, "schema": schema}


HEADERS = [
    parameter("mcp-session-id", "header", ["fuzz-0", ""]),
    parameter("mcp-protocol-version", "header", ["2025-11-25", "2025-03-26", "2026-07-28", "1"]),
    parameter("mcp-method", "header", ["ping", "tools/list", "tools/call", "server/discover"]),
    parameter("last-event-id", "header", ["0" * 32 + ".1", "x"]),
    parameter("accept", "header", ["application/json, text/event-stream", "*/*", "text/event-stream"]),
]
DESCRIPTION = {
    "openapi": "3.1.0",
    "info": {"title": "pgmcp", "version": "1"},
    "paths": {
        "/mcp": {
            "post": {"parameters": HEADERS, "requestBody": BODY, **ANSWERS},
            "get": {"parameters": HEADERS, **ANSWERS},
            "delete": {"parameters": HEADERS, **ANSWERS},
        },
        "/sse": {"post": {"parameters": HEADERS, "requestBody": BODY, **ANSWERS}},
        "/messages/": {
            "post": {"parameters": [parameter("session_id", "query", ["fuzz-0", ""])], "requestBody": BODY, **ANSWERS}
        },
        "/livez": {"get": ANSWERS},
        "/readyz": {"get": ANSWERS},
    },
}
surface = schemathesis.openapi.from_dict(DESCRIPTION)


@surface.parametrize()
@settings(
    derandomize=True,
    database=None,
    max_examples=10,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_surface(case: schemathesis.Case[Any], watched: Target) -> None:
    response = case.call(base_url=watched.node.url, timeout=2)  # GET /sse, made unasked, is cut short
    case.validate_response(response, checks=[not_a_server_error])
