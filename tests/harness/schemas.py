"""Servers of one file are loaded hundreds of times in a run, each for a memory of its own; their schemas are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcp.server.mcpserver.prompts.base import Prompt
from mcp.server.mcpserver.tools.base import Tool

_made: dict[Any, Any] = {}


def remember() -> None:
    """From now on this process makes what stands for a function of the everything server once only.

    It takes most of the time that loading the file takes. A tool gets its new function, with the new memory; prompts
    have no memory, and keep their first one.
    """
    _once(Tool, lambda made, fn: made.model_copy(update={"fn": fn}))
    _once(Prompt, lambda made, _: made)


def _once(kind: Any, again: Callable[[Any, Callable[..., Any]], Any]) -> None:
    anew = kind.from_function

    def from_function(fn: Callable[..., Any], **how: Any) -> Any:
        if not fn.__code__.co_filename.endswith("everything.py") or fn.__closure__ is not None:
            return anew(fn, **how)
        key = kind, fn.__code__, repr(how)
        if key in _made:
            return again(_made[key], fn)
        return _made.setdefault(key, anew(fn, **how))

    kind.from_function = from_function
