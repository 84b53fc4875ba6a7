"""Servers of one file are loaded hundreds of times in a run, each for a memory of its own; their schemas are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mcp.server.mcpserver.tools import base
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata, func_metadata

_made: dict[Any, FuncMetadata] = {}


def remembered(
    func: Callable[..., Any], skip_names: Sequence[str] = (), structured_output: bool | None = None
) -> FuncMetadata:
    """The SDK's ``func_metadata``, once for each function: it takes most of the time that loading a file takes."""
    key = (func.__code__, tuple(skip_names), structured_output) if func.__closure__ is None else None
    if key is None or not func.__code__.co_filename.endswith("everything.py"):
        return func_metadata(func, skip_names=skip_names, structured_output=structured_output)
    if key not in _made:
        _made[key] = func_metadata(func, skip_names=skip_names, structured_output=structured_output)
    return _made[key]


def remember() -> None:
    """Do so in this process from now on."""
    base.func_metadata = remembered  # type: ignore[attr-defined]  # imported there, and not for others
