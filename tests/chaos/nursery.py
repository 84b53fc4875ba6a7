"""Nodes by fork: a process that has imported everything makes real node processes in a tenth of the time.

``Nursery`` is the test's side. The other side, ``python -m tests.chaos.nursery``, reads one order a line and says the
new process's id; it starts nothing of pgmcp itself, so that a child finds no loop, thread or connection of a parent.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness.processes import REPOSITORY, NodeProcess

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


class Nursery:
    """Starts nodes; they end with it, and it with the test run."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery", str(os.getpid())],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def bear(self, node: NodeProcess) -> Child:
        """Start a node's command as a fork."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"args": node.command[3:], "env": node.env, "log": str(node.log_path)}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return Child(int(self._process.stdout.readline()))

    def close(self) -> None:
        """End it, and every node that still runs."""
        self._process.kill()
        self._process.communicate()


class Child:
    """A process that is nobody's child here, with as much of ``subprocess.Popen`` as a ``ManagedProcess`` uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._file: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._file = None

    def poll(self) -> int | None:
        """The exit status, which nobody here can know: 0; None while the process runs."""
        try:
            self.wait(0)
        except subprocess.TimeoutExpired:
            return None
        return 0

    def wait(self, timeout: float) -> int:
        """Wait for the end."""
        if self._file is not None:
            if not select.select([self._file], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            os.close(self._file)
            self._file = None
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self._file is not None:
            signal.pidfd_send_signal(self._file, number)


class ForkedNode(NodeProcess):
    """A node that a nursery starts."""

    def __init__(self, nursery: Nursery, target: str, **options: Any) -> None:
        super().__init__(target, **options)
        self._nursery = nursery

    def start(self) -> ForkedNode:
        """See ``ManagedProcess.start``."""
        assert not self.running, f"{self.name} runs already"
        self._process = self._nursery.bear(self)  # type: ignore[assignment]
        return self


def _serve_orders() -> None:
    _end_with(int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    for module in NEEDED:
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
        print(pid, flush=True)


def _become(order: dict[str, Any]) -> None:
    _end_with(os.getppid())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(Path(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(file, number)
    os.environ.update(order["env"])
    try:
        importlib.import_module("pgmcp.cli").main(order["args"], prog_name="pgmcp")
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    os._exit(1)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    _serve_orders()
