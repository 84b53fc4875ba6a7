"""Child processes that end with their parent, and the user that PostgreSQL runs as.

Invariants:
    * PostgreSQL never runs as root: started by root it runs as an ordinary account, with that account's group
      and no others.
    * A child started with ``bound_to_parent`` never outlives its parent, however that dies.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgmcp.errors import EmbeddedError

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def bound_to_parent(signum: signal.Signals) -> Callable[[], None]:
    """Make a ``preexec_fn`` that has the kernel send ``signum`` to the child when its parent dies.

    For the kernel the parent is the *thread* that forks: start the child from one that lives as long as the process.
    """
    parent = os.getpid()

    def bind() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, int(signum))
            if os.getppid() != parent:  # it died before the kernel was told
                os._exit(1)

    return bind


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Account:
    """Who the server runs as: ``ids`` are uid and gid to change to, or None to stay the user that we are."""

    ids: tuple[int, int] | None = None

    @property
    def uid(self) -> int:
        """The server's user."""
        return self.ids[0] if self.ids else os.geteuid()

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ``Popen`` that change to the account."""
        return {"user": self.ids[0], "group": self.ids[1], "extra_groups": []} if self.ids else {}

    def own(self, path: Path) -> None:
        """Give the account a file or folder that we have just made."""
        if self.ids:
            os.chown(path, *self.ids)

    def reaches(self, folder: Path) -> bool:
        """Whether the account may pass through the folder; the kernel is asked, since it knows ACLs too."""
        asked = subprocess.run(  # noqa: S603 - the folder is an argument, not code
            ["/bin/sh", "-c", 'cd -- "$1"', "sh", folder], cwd="/", check=False, capture_output=True, **self.arguments
        )
        return asked.returncode == 0

    def run(self, command: Sequence[str | Path], env: dict[str, str], timeout: float) -> str:
        """Run one of PostgreSQL's programs to its end and return what it printed.

        Args:
            command: program and arguments.
            env: the whole environment.
            timeout: seconds that it may take.

        Raises:
            EmbeddedError: it cannot be run, failed, or took too long.
        """
        try:
            done = subprocess.run(  # noqa: S603 - a list, no shell
                command,
                cwd="/",
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=True,
                timeout=max(timeout, 0.1),
                preexec_fn=bound_to_parent(signal.SIGTERM),
                **self.arguments,
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = str(getattr(error, "stderr", "") or error).strip()[-800:]
            message = f"{command[0]} failed: {said}. PGMCP_PG_BIN can name other binaries."
            raise EmbeddedError(message) from error
        return str(done.stdout)


def account_for(data: Path) -> Account:
    """The account for a data directory: its owner if it exists, else ``postgres``, else ``nobody``.

    Raises:
        EmbeddedError: we are root and there is no such user.
    """
    if os.geteuid() != 0:
        return Account()
    if data.exists() and (found := data.lstat()).st_uid:
        return Account((found.st_uid, found.st_gid))
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account((entry.pw_uid, entry.pw_gid))
    message = "PostgreSQL refuses to run as root, and there is no user postgres or nobody. Start as another user."
    raise EmbeddedError(message)
