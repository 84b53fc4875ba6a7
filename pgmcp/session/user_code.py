"""Running code that its user named: it finds those beside it, shadows nothing, and its mistakes are told as its own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from pgmcp.errors import TargetError

_AROUND = ("pgmcp", "importlib", "_frozen_importlib", "asyncio")
"""Packages whose code stands in a trace above the user's."""


def module_named(name: str) -> object:
    """Import a module by its name; the working directory may have it."""
    _look_in(Path.cwd())
    return importlib.import_module(name)


def module_in(path: Path) -> object:
    """Run a file, which may import those beside it.

    They may import it back by its name, unless that is another module's: ``json.py`` stays beside ``json``.
    """
    path = path.absolute()
    _look_in(path.parent)
    name = path.stem if _free(path) else f"served_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        message = f"{path} is no Python file"
        raise ImportError(message)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def _free(path: Path) -> bool:
    """Whether a file may have its own name among the modules; loaded again, it takes its own place."""
    if path.stem in sys.stdlib_module_names:
        return False
    known = sys.modules.get(path.stem)
    return known is None or getattr(known, "__file__", None) == str(path)


def _look_in(folder: Path) -> None:
    """Let modules be imported from a folder: before those that are installed, after the standard library."""
    if str(folder) in sys.path:
        return
    paths = sysconfig.get_paths()
    standard = {paths["stdlib"], paths["platstdlib"], f"{paths['platstdlib']}/lib-dynload"}
    places = [place for place, entry in enumerate(sys.path) if entry in standard]
    sys.path.insert(max(places, default=-1) + 1, str(folder))


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a ``TargetError`` that has the user's part of the trace.

    Args:
        what: begins the message: "The target 'server.py:mcp' cannot be loaded".

    Raises:
        TargetError: for any exception; a mistake in the syntax says its place and needs no trace.
    """
    try:
        yield
    except TargetError:
        raise
    except SyntaxError as error:
        where = f"in {error.filename}, line {error.lineno}: {(error.text or '').strip()}"
        message = f"{what}: {error.msg} {where}"
        raise TargetError(message) from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
        message = f"{what}: {said}."
        raise TargetError(message, trace_of(error)) from error


def trace_of(error: Exception) -> str:
    """The trace of an exception from where the user's code begins; empty where none of it ran."""
    tb = error.__traceback__
    while tb is not None and _around(tb):
        tb = tb.tb_next
    return "" if tb is None else "".join(traceback.format_exception(type(error), error, tb)).rstrip()


def _around(tb: TracebackType) -> bool:
    name = tb.tb_frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0] in _AROUND
