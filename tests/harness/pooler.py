"""pgbouncer before PostgreSQL: in the tests that ask for it or, with ``PGMCP_TEST_POOLER=1``, in all that run nodes."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.harness.processes import accepts, free_ports
from tests.harness.waiting import wait_until

SWITCH = "PGMCP_TEST_POOLER"
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

# As many backends as two nodes have connections: fewer, and statements that wait for a lock hold up strangers.
CONFIG = """
[databases]
* = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 12
max_client_conn = 1000
server_login_retry = 0.2
{more}
"""


@contextmanager
def pooler(database: str, mode: str = "transaction", more: str = "") -> Iterator[str]:
    """Put a pooler before the server of a database; the database's address through it.

    Args:
        more: lines of its configuration.
    """
    parts = urlsplit(database)
    [listen] = free_ports(1)
    text = CONFIG.format(
        host=parts.hostname, port=parts.port, user=parts.username, password=parts.password or "-",
        listen=listen, mode=mode, more=more,
    )  # fmt: skip
    # pgbouncer refuses to run as root, and another user cannot look into pytest's folders.
    folder = Path(tempfile.mkdtemp(prefix="pgmcp-test-"))
    config = folder / "pgbouncer.ini"
    config.write_text(text)
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        other = pwd.getpwnam("nobody")
        for path in (folder, config):
            os.chown(path, other.pw_uid, other.pw_gid)
        user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
    process = subprocess.Popen([str(PGBOUNCER), "-q", str(config)], cwd="/", **user)
    try:
        wait_until(lambda: accepts(listen), 10, "pgbouncer does not listen")
        yield f"postgresql://{parts.username}@127.0.0.1:{listen}{parts.path}"
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


def switched() -> bool:
    """Whether nodes go through a pooler."""
    return os.environ.get(SWITCH) == "1"


@dataclass(slots=True)
class _Shared:
    """One pooler for all that are in one place."""

    stack: ExitStack
    address: str
    users: int = 0


_shared: dict[str, _Shared] = {}


@contextmanager
def way_to(database: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings that lead to a database; with the switch all but the line goes through one pooler for all nodes."""
    if not switched():
        yield settings | {"database_url": database}
        return
    if database not in _shared:
        stack = ExitStack()
        _shared[database] = _Shared(stack, stack.enter_context(pooler(database)))
    shared = _shared[database]
    shared.users += 1
    try:
        yield {"listen_url": database} | settings | {"database_url": shared.address}
    finally:
        shared.users -= 1
        if not shared.users:
            del _shared[database]
            shared.stack.close()
