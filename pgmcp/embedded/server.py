"""One private PostgreSQL server and its folder.

Invariants:
    * The server is a direct child and the kernel interrupts it when its starter dies, so it never outlives it.
    * No existing folder's mode is changed: if the server's user cannot reach the wanted folder, the data moves.
    * Nobody gets in without the random password, which lies in a 0600 file beside the data directory.
    * One process at a time works on a folder: it holds a lock on it, which the kernel releases with the process.

Failure handling:
    A set-up that was cut short leaves only a scratch folder, which the next start throws away: the finished data
    directory appears by one rename. A server that was killed leaves a pid file that says "ready"; it is believed
    only if it names our own child. What a human must decide is an ``EmbeddedError`` that says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pgmcp.embedded import binaries
from pgmcp.embedded.process import Account, account_for, bound_to_parent, free_port
from pgmcp.errors import EmbeddedError

Part = TypeVar("Part")

_POLL_SECONDS = 0.01  # seconds between looks at the pid file
_PATIENCE_SECONDS = 5.0  # seconds for a server to stop whose starter was killed
_SOCKET_BASE_BYTES = 70  # bytes that the socket's base folder may have, of the 107 of a socket's path
_VOLATILE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_PASSING = ("Address already in use", "pre-existing shared memory block")


class EmbeddedPostgres:
    """A PostgreSQL of our own, on 127.0.0.1 and on a unix socket; superuser ``postgres``.

    Everything lies in one folder, ``home``: ``pgdata``, ``password``, ``server.log``, ``lock``. ``home`` is the
    wanted folder, except for root when the server's user cannot reach that (a checkout below root's own 0700
    home): then it is ``pgmcp-<hash of the wanted path>`` in /var/tmp, the same one at every start. As root the
    server runs as the owner of the data that is already there, else as ``postgres``, else as ``nobody``.

    Args:
        data: the wanted folder: a new or empty one, or one of an earlier start.
        settings: server settings, which win over this class's own.
        durable: False for data that need not survive a crash; commits are much faster.
    """

    def __init__(self, data: Path, *, settings: Mapping[str, str] | None = None, durable: bool = True) -> None:
        self.wanted = self.home = data.absolute()
        self.durable = durable
        self._settings = dict(settings or {})
        self._account = Account()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._socket_dir: Path | None = None
        self._url = ""
        # Without the locale variables: initdb fails on a locale that the machine has not generated.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PG"))}
        self._env = {**kept, "LC_ALL": "C", "TZ": "UTC"}

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The superuser's address over TCP, with the password.

        Raises:
            EmbeddedError: the server does not run.
        """
        return _running(self._url)

    @property
    def socket_dir(self) -> Path:
        """The folder of the unix socket, which only the server's user (and root) may enter.

        Raises:
            EmbeddedError: the server does not run.
        """
        return _running(self._socket_dir)

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            EmbeddedError: the server does not run.
        """
        return _running(self._process).pid

    def start(self, timeout: float = 30.0) -> str:
        """Set the folder up if it is new, start the server and wait until it takes connections.

        Call it from the main thread: the server stops as soon as the thread that started it ends.

        Args:
            timeout: seconds for all of it.

        Returns:
            ``postgresql://postgres:<password>@127.0.0.1:<port>/postgres``

        Raises:
            EmbeddedError: no binaries, an unusable folder, or the server failed; the message says what to do.
        """
        if self._url:
            return self._url
        if threading.current_thread() is not threading.main_thread():
            message = "The embedded PostgreSQL must be started from the main thread."
            raise EmbeddedError(message)
        try:
            self._url = self._start(time.monotonic() + timeout)
        except OSError as error:
            self.stop()
            message = f"The embedded PostgreSQL cannot use {self.home}: {error}. Choose another folder."
            raise EmbeddedError(message) from error
        except BaseException:
            self.stop()
            raise
        return self._url

    def stop(self, timeout: float = 10.0) -> None:
        """Stop the server without waiting for its clients; harmless when it does not run.

        Args:
            timeout: seconds for a clean shutdown, after which it is forced to end.
        """
        process, self._process, self._url = self._process, None, ""
        if process is not None:
            _end(process, timeout)
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _start(self, deadline: float) -> str:
        self._settle()
        self._socket_dir = self._make_socket_dir()
        programs, major = binaries.runnable(binaries.find(), self._account, self.home, self._env)
        data = self.home / "pgdata"
        if not data.exists():
            self._initialise(programs, data, deadline)
        _check_version(data, major)
        password = self._password()
        _await_predecessor(data, deadline)
        port = self._launch(programs, data, deadline)
        return f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"

    def _settle(self) -> None:
        """Choose account and home, make the home and lock it."""
        self.home = self.wanted
        self._account = account_for(self.home / "pgdata")
        trusted = {os.geteuid(), self._account.uid}
        if not (self._account.reaches(_nearest(self.wanted)) and self._account.reaches(self._make_home())):
            self.home = self._moved_home()
            self._account = account_for(self.home / "pgdata")
            trusted = {os.geteuid()}  # anybody can make a folder of this name
            self._make_home()
        if self.home.is_symlink() or self.home.stat().st_uid not in trusted:
            message = f"{self.home} belongs to another user. Choose another folder."
            raise EmbeddedError(message)
        names = {entry.name for entry in self.home.iterdir()}
        if names and "lock" not in names:
            message = f"{self.home} holds other files. Choose a new or an empty folder."
            raise EmbeddedError(message)
        self._lock = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{self.home} is in use by another process. Stop that one or choose another folder."
            raise EmbeddedError(message) from None

    def _make_home(self) -> Path:
        if not self.home.exists():
            self.home.mkdir(parents=True)
            self.home.chmod(0o711 if self._account.ids else 0o700)
        return self.home

    def _moved_home(self) -> Path:
        if self._account.ids is None:
            message = f"{self.wanted} cannot be entered. Choose another folder."
            raise EmbeddedError(message)
        name = f"pgmcp-{hashlib.sha256(os.fsencode(self.wanted)).hexdigest()[:16]}"
        return self._reachable("/var/tmp", tempfile.gettempdir()) / name  # noqa: S108 - its owner is checked

    def _make_socket_dir(self) -> Path:
        base = self._reachable(tempfile.gettempdir(), "/tmp")  # noqa: S108 - used by mkdtemp
        if len(os.fsencode(base)) > _SOCKET_BASE_BYTES:
            base = self._reachable("/tmp")  # noqa: S108
        folder = Path(tempfile.mkdtemp(prefix="pgmcp-", dir=base))
        self._account.own(folder)
        return folder

    def _reachable(self, *folders: str) -> Path:
        for folder in folders:
            if self._account.reaches(Path(folder)):
                return Path(folder)
        message = f"The server's user reaches none of: {', '.join(folders)}. Choose another folder or TMPDIR."
        raise EmbeddedError(message)

    def _initialise(self, programs: Path, data: Path, deadline: float) -> None:
        """Run initdb in a scratch folder and rename the result into place, so that no half of it is ever used."""
        scratch = data.with_name("pgdata.new")
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir(mode=0o700)
        self._account.own(scratch)
        password = secrets.token_urlsafe(24)
        handed = self.socket_dir / "password"  # initdb reads it as the server's user
        _write_secret(handed, password)
        self._account.own(handed)
        command: list[str | Path] = [programs / "initdb", "-D", scratch, "-U", "postgres", "-E", "UTF8", "--locale=C"]
        command += ["-A", "scram-sha-256", "--pwfile", handed, *([] if self.durable else ["--no-sync"])]
        self._account.run(command, self._env, deadline - time.monotonic())
        handed.unlink()
        _write_secret(self.home / "password", password)
        scratch.rename(data)

    def _password(self) -> str:
        path = self.home / "password"
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            message = f"{path} is missing, so nobody can log in. Put it back, or delete {self.home} to start anew."
            raise EmbeddedError(message) from None

    def _launch(self, programs: Path, data: Path, deadline: float) -> int:
        """Start the server and return its port; retried if another process took the port first."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(self.socket_dir)}
        settings |= {} if self.durable else _VOLATILE
        options = [part for item in (settings | self._settings).items() for part in ("-c", "=".join(item))]
        log = self.home / "server.log"
        while True:
            port = free_port()
            self._process = process = self._spawn([programs / "postgres", "-D", data, "-p", str(port), *options], log)
            if _await_ready(process, data, deadline):
                return port
            said = log.read_text(errors="replace").strip()
            if time.monotonic() > deadline or not any(text in said for text in _PASSING):
                message = f"PostgreSQL did not start. The end of {log}: {said[-800:]}"
                raise EmbeddedError(message)

    def _spawn(self, command: list[str | Path], log: Path) -> subprocess.Popen[bytes]:
        # Kept for one start only, so that it stays small; never through a link, since we may be root.
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            return subprocess.Popen(  # noqa: S603 - a list, no shell
                command,
                cwd="/",
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=bound_to_parent(signal.SIGINT),  # noqa: PLW1509 - only system calls
                start_new_session=True,  # Ctrl-C is for the starter, which then stops the server in its order
                **self._account.arguments,
            )
        finally:
            os.close(output)


def _running(part: Part | None) -> Part:
    if not part:
        message = "The embedded PostgreSQL does not run. Call start() first."
        raise EmbeddedError(message)
    return part


def _end(process: subprocess.Popen[bytes], timeout: float) -> None:
    for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        process.send_signal(signum)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            continue
        return


def _nearest(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _write_secret(path: Path, secret: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(f"{secret}\n")


def _check_version(data: Path, major: str) -> None:
    try:
        found = (data / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        found = "no"
    if found != major:
        message = (
            f"{data} holds {found} PostgreSQL data, but the binaries are of version {major}. Choose another folder, "
            "delete this one, or set PGMCP_PG_BIN to binaries of its version."
        )
        raise EmbeddedError(message)


def _await_ready(process: subprocess.Popen[bytes], data: Path, deadline: float) -> bool:
    """Whether the server came up in time: the pid file says so and has its pid, not a killed predecessor's."""
    while time.monotonic() < deadline:
        lines = _pid_file(data)
        if len(lines) > 7 and lines[0] == str(process.pid) and lines[7] == "ready":
            return True
        try:
            process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return False
    return False


def _await_predecessor(data: Path, deadline: float) -> None:
    """Wait for a server whose starter was killed: the kernel has told it to stop, which takes a moment."""
    patience = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
    while (pid := _server_of(data)) is not None:
        if time.monotonic() > patience:
            message = f"{data} is in use by a live server, process {pid}. Stop it or choose another folder."
            raise EmbeddedError(message)
        time.sleep(_POLL_SECONDS)


def _server_of(data: Path) -> int | None:
    """The pid of a live server on this data; None after making a stale pid file harmless.

    PostgreSQL takes whatever has the pid of its last run for a live server: another program, or the unburied rest
    of itself. But it ignores its own parent, which we are going to be, and the rest of the file still tells it
    whether old processes hold on to the shared memory.
    """
    lines = _pid_file(data)
    if not lines or not Path("/proc/self").exists():
        return None
    try:
        if lines[0].isdigit() and Path(f"/proc/{lines[0]}/cwd").resolve(strict=True) == data.resolve():
            return int(lines[0])
    except OSError:
        pass  # gone, unburied, or of a user who cannot own this data
    with os.fdopen(os.open(data / "postmaster.pid", os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "w") as file:
        file.write("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    return None


def _pid_file(data: Path) -> list[str]:
    try:
        return [line.strip() for line in (data / "postmaster.pid").read_text().splitlines()]
    except FileNotFoundError:
        return []
