"""JSON in strings: where a tool wants no string, the SDK parses one that a client sent (some clients send lists so).

What a body contains is bounded before it is parsed (``pgmcp.web.json_limits``), but what its strings contain is not:
four megabytes of lists in a string would hold the event loop for a second.

Invariant: those strings of one call that are parsed have together no more brackets, colons and commas than a body may
have. The others stay the strings that they are, as the SDK leaves those that are no JSON, and fail the validation of an
argument that wants something else.

Failure handling: the SDK has no setting for this, so its method is replaced.
"""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata

MARKS = 50_000
"""As many as ``--max-elements`` lets a body have by default."""


def _too_much(data: dict[str, Any]) -> set[str]:
    """The arguments that are not to be parsed: those with the most."""
    marks = {key: sum(map(value.count, "[{:,")) for key, value in data.items() if isinstance(value, str)}
    left, total = set(), 0
    for key in sorted(marks, key=marks.__getitem__):
        total += marks[key]
        if total > MARKS:
            left.add(key)
    return left


def bound_parsing() -> None:
    """Bound what the SDK parses, in this process."""
    parse = FuncMetadata.pre_parse_json

    def bounded(self: FuncMetadata, data: dict[str, Any]) -> dict[str, Any]:
        left = _too_much(data)
        return data | parse(self, {key: value for key, value in data.items() if key not in left})

    FuncMetadata.pre_parse_json = bounded  # type: ignore[method-assign]
