"""What may be written of a log record: of a library's only what stands in its source, of an error only where it was.

Libraries that carry clients' messages log names, uris, answers and whole messages, as arguments or in f-strings; the
texts of exceptions quote them, too. Of such a record the template is kept as the library's authors wrote it, without
what it was filled with: ``Invalid Host header: {host}``. The served server's own records, and those of other libraries,
are its operator's: they are kept as they are.

Failure handling: a call whose source cannot be read is named by its place.
"""

from __future__ import annotations

import ast
import linecache
import logging
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TextIO

LIBRARIES = (
    "alembic",
    "anyio",
    "asyncio",
    "asyncpg",
    "concurrent",
    "fastmcp",
    "httpcore",
    "httptools",
    "httpx",
    "key_value",
    "litestar",
    "mcp",
    "mcp_types",
    "pydantic",
    "pydantic_settings",
    "sqlalchemy",
    "sse_starlette",
    "starlette",
    "uvicorn",
    "uvloop",
)
"""Whose records and warnings never show a value."""

LONGEST = 40
"""Lines of source that one call may take."""

FRAMES, ERRORS = 40, 20
"""Innermost frames of an error that are written, and errors of a chain or group."""

_SAYS = frozenset({"critical", "debug", "error", "exception", "info", "log", "warning"})


@lru_cache(1)
def _folders() -> tuple[str, ...]:
    specs = (find_spec(name) for name in LIBRARIES)
    return tuple(f"{Path(spec.origin).parent}/" for spec in specs if spec is not None and spec.origin is not None)


@lru_cache(1)
def _own() -> str:
    return f"{Path(__file__).parent.parent}/"


def library(path: str) -> bool:
    """Whether a file belongs to a library that carries clients' messages."""
    return path.startswith(_folders())


def _of_library(record: logging.LogRecord) -> bool:
    """By the file that logs, or (compiled ones have none) by the logger; servers get their own from FastMCP."""
    head = record.name.partition(".")[0]
    return library(record.pathname) or (head in LIBRARIES and head != "fastmcp")


def said(record: logging.LogRecord) -> str:
    """The record's message, as far as it may be written."""
    if not _of_library(record):
        return record.getMessage()
    return _template(record.pathname, record.lineno) or f"{record.funcName} ({record.filename}:{record.lineno})"


@lru_cache(1024)
def _template(path: str, number: int) -> str | None:
    """The text that a logging call has in its source; None if it cannot be found there."""
    lines = linecache.getlines(path)[number - 1 : number - 1 + LONGEST]
    for end in range(1, len(lines) + 1):
        try:
            tree = ast.parse(textwrap.dedent("".join(lines[:end])))
        except SyntaxError:
            continue
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _SAYS:
                return _text(call.args[call.func.attr == "log" :])
        return None
    return None


def _text(args: list[ast.expr]) -> str | None:
    match args:
        case [ast.Constant(value=str(text)), *_] | [ast.BinOp(left=ast.Constant(value=str(text))), *_]:
            return text
        case [ast.JoinedStr(values=values), *_]:
            return "".join(_part(value) for value in values)
    return None


def _part(value: ast.expr) -> str:
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.FormattedValue(value=inner):
            return f"{{{ast.unparse(inner)}}}"
    return "{}"


def trace(record: logging.LogRecord) -> str | None:
    """The record's error: whole in what the served server logs, else its kinds and frames without any text."""
    if not record.exc_info or record.exc_info[1] is None:
        return None
    error = record.exc_info[1]
    if _of_library(record) or record.pathname.startswith(_own()):
        return "\n".join(_kinds_and_frames(error, set()))
    return "".join(traceback.format_exception(error)).rstrip("\n")


def _kinds_and_frames(error: BaseException, seen: set[int]) -> Iterator[str]:
    if id(error) in seen or len(seen) >= ERRORS:
        return
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _kinds_and_frames(before, seen)
        yield "which led to:"
    yield "Traceback (most recent call last):"
    yield from (frame.rstrip("\n") for frame in _frames(error.__traceback__))
    state = getattr(error, "sqlstate", None)
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    yield f"{kind} ({state})" if isinstance(state, str) else kind
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield "of which one is:"
            yield from _kinds_and_frames(each, seen)


def _frames(trace: TracebackType | None) -> list[str]:
    return traceback.format_tb(trace, limit=-FRAMES)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a warning; one that comes from a library without its text, which may quote what was validated."""
    text = "its text is left out" if library(filename) else str(message)
    logging.getLogger("py.warnings").warning("%s at %s:%d: %s", category.__name__, filename, lineno, text)


def capture_warnings() -> None:
    """Let the process's warnings come as log records, as far as they may be written."""
    warnings.showwarning = show_warning
