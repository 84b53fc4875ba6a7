"""Nodes by fork: a process that has imported everything makes real node processes in a tenth of the time.

``bear`` is the test's side. The other side, ``python -m tests.harness.nursery``, takes one order a line and answers
with one; it starts nothing of pgmcp itself, so that a child finds no loop, thread or connection of a parent.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = (
    "asyncpg.protocol",
    "httptools",
    "mcp.server.mcpserver",
    "pgmcp.cli.serve",
    "pgmcp.session.adapters.sdk",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
)
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def bear(arguments: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
    """Start ``pgmcp ARGUMENTS`` as a fork; it ends with the test run.

    Args:
        env: all of its environment.
        log: gets what it writes.
    """
    nursery = _nursery()
    return Child(nursery, nursery.ask({"args": list(arguments), "env": dict(env), "log": str(log)}))


class _Nursery:
    """The process that forks."""

    def __init__(self) -> None:
        assert threading.current_thread() is threading.main_thread(), "it would end with this thread"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.nursery", str(os.getpid())],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(self._end)

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, order: dict[str, Any]) -> int:
        """Give an order; its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


_nursery = cache(_Nursery)


class Child:
    """A process that is the nursery's child, with as much of ``subprocess.Popen`` as a ``ManagedProcess`` uses."""

    def __init__(self, nursery: _Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery, self._file = nursery, os.pidfd_open(pid)
        self._status: int | None = None

    def __del__(self) -> None:
        os.close(self._file)

    def poll(self) -> int | None:
        """The exit status; None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float) -> int:
        """Wait for the end; the exit status."""
        if self._status is None:
            if not select.select([self._file], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self._status = self._nursery.ask({"ended": self.pid})
        return self._status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        if self._status is None:
            signal.pidfd_send_signal(self._file, number)


def _serve_orders() -> None:
    _end_with(int(sys.argv[1]))
    for module in NEEDED:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        if "ended" in order:  # until then it stays a zombie, and its id is nobody else's
            answer = os.waitstatus_to_exitcode(os.waitpid(order["ended"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _become(order)
        print(answer, flush=True)


def _become(order: dict[str, Any]) -> None:
    _end_with(os.getppid())
    log = os.open(Path(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(file, number)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(order["env"])
    code = 1
    try:
        importlib.import_module("pgmcp.cli").main(order["args"], prog_name="pgmcp")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - its end
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
    _serve_orders()
