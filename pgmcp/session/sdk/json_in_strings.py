"""JSON in strings: where a tool wants no string, the SDK parses one that a client sent (some clients send lists so).

What a body contains is bounded before it is parsed (``pgmcp.web.json_limits``), but what its strings contain is not:
four megabytes of lists in a string would hold the event loop for a second.

Invariant: no string is parsed that has more brackets, colons and commas than a body may have. It stays the string that
it is, as the SDK leaves those that are no JSON, and fails the validation of an argument that wants something else.

Failure handling: the SDK has no setting for this, so its method is replaced.
"""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata

MARKS = 50_000
"""As many as ``--max-elements`` lets a body have by default."""


def _too_much(value: object) -> bool:
    return isinstance(value, str) and len(value) > MARKS and sum(map(value.count, "[{:,")) > MARKS


def bound_parsing() -> None:
    """Bound what the SDK parses, in this process."""
    parse = FuncMetadata.pre_parse_json

    def bounded(self: FuncMetadata, data: dict[str, Any]) -> dict[str, Any]:
        left = {key: value for key, value in data.items() if _too_much(value)}
        return data | parse(self, {key: value for key, value in data.items() if key not in left})

    FuncMetadata.pre_parse_json = bounded  # type: ignore[method-assign]
