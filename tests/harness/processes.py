"""Processes under test: they log to a file, are waited for with a bound, and never outlive the test run.

Start them from the main thread: the kernel kills a child when the *thread* that started it ends.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx

from tests.harness import nursery
from tests.harness.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = ssl.create_default_context()
"""For clients that use no TLS: each that reads the system's certificates anew costs 50 ms."""
ProcessT = TypeVar("ProcessT", bound="ManagedProcess")

# Runs before the program itself, in the child: "kill me when my parent ends", then become the program.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests in the background ignores it
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def accepts(port: int) -> bool:
    """Whether somebody listens on the port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


class ManagedProcess:
    """A child process with a log file; a context manager that waits for readiness and ends it."""

    def __init__(self, command: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None) -> None:
        self.command = tuple(command)
        self.log_path = log_path
        self.env = dict(env or {})
        self._process: subprocess.Popen[bytes] | nursery.Child | None = None

    def start(self) -> Self:
        """Start the process without waiting for it."""
        assert self._process is None or self._process.poll() is not None, f"{self.command[0]} runs already"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._spawn({**os.environ, **self.env})
        return self

    def _spawn(self, env: Mapping[str, str]) -> subprocess.Popen[bytes] | nursery.Child:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self.command],
                cwd=REPOSITORY,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def is_ready(self) -> bool:
        """Whether the process does its work; here: whether it runs."""
        return self.running

    def wait_ready(self, timeout: float = 30) -> Self:
        """Wait until the process is ready; fail with its log if it ends or is not ready in time."""

        def settled() -> bool:
            if not self.running:
                raise AssertionError(f"ended with {self.returncode}: {self._description()}")
            return self.is_ready()

        wait_until(settled, timeout, lambda: f"not ready after {timeout} s: {self._description()}")
        return self

    @property
    def process(self) -> subprocess.Popen[bytes] | nursery.Child:
        """The running or ended process."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        """The process id; of the program itself, since the launcher becomes it."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit status, None while it runs."""
        return self.process.poll()

    @property
    def log(self) -> str:
        """Everything the process has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal and return at once; nothing happens if the process has ended."""
        if self.running:
            self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        """Wait for the end and return the exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self._description()}") from None

    def terminate(self, timeout: float = 30) -> int:
        """Ask the process to end (SIGTERM) and wait for it."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> int:
        """End the process at once (SIGKILL), also if it is paused."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def pause(self) -> None:
        """Freeze the process (SIGSTOP)."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen process go on (SIGCONT)."""
        self.signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the process in whatever state it is: politely for 10 s, then not."""
        if not self.running:
            return
        self.resume()
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Self:
        self.start()
        try:
            return self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _description(self) -> str:
        return f"{' '.join(self.command)}\n{self.log[-8000:]}"


class ServerProcess(ManagedProcess):
    """A process that serves HTTP on one port of 127.0.0.1; ready when it accepts connections."""

    def __init__(
        self, command: Sequence[str], *, port: int, log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(command, log_path=log_path, env=env)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.mcp_url = f"{self.url}/mcp"

    def is_ready(self) -> bool:
        return accepts(self.port)


class NodeProcess(ServerProcess):
    """One pgmcp node: ``pgmcp serve TARGET``; ready when ``/readyz`` says 200; a fork unless of another build."""

    def __init__(
        self,
        target: str,
        *,
        database_url: str,
        name: str,
        port: int,
        log_dir: Path,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
    ) -> None:
        super().__init__(
            [sys.executable, "-m", "pgmcp", "serve", target, "--node-name", name, "--port", str(port), *args],
            port=port,
            log_path=log_dir / f"{name}.log",
            env={
                "PGMCP_DATABASE_URL": database_url,
                "PGMCP_DRAIN_NOTICE": "0",
                "PYTHONUNBUFFERED": "1",
                **(env or {}),
            },
        )
        self.name = name

    def _spawn(self, env: Mapping[str, str]) -> subprocess.Popen[bytes] | nursery.Child:
        return super()._spawn(env) if "PYTHONPATH" in self.env else nursery.bear(self.command[3:], env, self.log_path)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2, trust_env=False, verify=PLAIN).status_code == 200
        except httpx.HTTPError:
            return False


@contextmanager
def running(processes: Sequence[ProcessT], timeout: float = 30) -> Iterator[list[ProcessT]]:
    """Start all processes at once, wait for all, and end them all afterwards."""
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.stop)
            process.start()
        for process in processes:
            process.wait_ready(timeout)
        yield list(processes)
        for process in processes:
            process.resume()
            process.signal(signal.SIGTERM)  # all at once, so that their drains overlap


@contextmanager
def nodes(
    target: str,
    count: int,
    *,
    database_url: str,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
) -> Iterator[list[NodeProcess]]:
    """Run nodes named ``node-1`` to ``node-N`` on one database."""
    members = [
        NodeProcess(target, database_url=database_url, name=f"node-{n}", port=port, log_dir=log_dir, env=env, args=args)
        for n, port in enumerate(free_ports(count), start=1)
    ]
    with running(members) as started:
        yield started
