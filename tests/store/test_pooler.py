"""Migrations tell a transaction pooler from a session pooler, with a real pgbouncer."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pgmcp.errors import SchemaError
from pgmcp.store import migrations, views
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

CONFIG = """
[databases]
* = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
"""


@pytest.fixture
def pooled(empty_database: str) -> Iterator[Callable[[str], str]]:
    """Puts a pooler of the given mode before the database and returns the DSN through it."""
    running: list[subprocess.Popen[bytes]] = []
    folders: list[Path] = []

    def start(mode: str) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            listen = probe.getsockname()[1]
        parts = urlsplit(empty_database)
        text = CONFIG.format(
            host=parts.hostname, port=parts.port, user=parts.username, password=parts.password or "-",
            listen=listen, mode=mode,
        )  # fmt: skip
        # pgbouncer refuses to run as root, and another user cannot look into pytest's folders.
        folder = Path(tempfile.mkdtemp(prefix="pgmcp-test-"))
        folders.append(folder)
        config = folder / "pgbouncer.ini"
        config.write_text(text)
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            other = pwd.getpwnam("nobody")
            for path in (folder, config):
                os.chown(path, other.pw_uid, other.pw_gid)
            user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
        running.append(subprocess.Popen([str(PGBOUNCER), "-q", str(config)], cwd="/", **user))
        dsn = f"postgresql://{parts.username}@127.0.0.1:{listen}{parts.path}"
        _until_open(listen)
        return dsn

    yield start
    for process in running:
        process.terminate()
        process.wait(10)
    for folder in folders:
        shutil.rmtree(folder)


def _until_open(port: int) -> None:
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < end, "pgbouncer does not listen"
        else:
            return


def test_a_transaction_pooler_is_refused_for_migrations_but_not_for_reading(
    empty_database: str, pooled: Callable[[str], str]
) -> None:
    dsn = pooled("transaction")
    with pytest.raises(SchemaError, match="Migrations need a direct connection"):
        migrations.upgrade(dsn, "pgmcp")
    assert migrations.current(dsn, "pgmcp") is None
    migrations.upgrade(empty_database, "pgmcp")
    assert views.fetch(dsn, "pgmcp", "live_nodes") == []
    assert migrations.current(dsn, "pgmcp") == migrations.head()


def test_a_session_pooler_will_do(pooled: Callable[[str], str]) -> None:
    dsn = pooled("session")
    migrations.upgrade(dsn, "pgmcp")
    assert migrations.check(dsn, "pgmcp") == []


async def test_nodes_work_through_a_transaction_pooler(empty_database: str, pooled: Callable[[str], str]) -> None:
    """Everything but the line goes through it: no statement cache, no startup parameters, wake-ups still heard."""
    dsn = pooled("transaction")
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
    async with (
        cluster(dsn, everything, 2, listen_url=empty_database, poll=30.0) as nodes,
        RawSession() as session,
    ):
        await session.open(nodes[0].url, nodes[1].url)
        for turn, node in enumerate([*nodes, *nodes, *nodes], 1):
            result = await session.call_tool(node.url, "count")
            assert result["structuredContent"] == {"result": turn}
        slow = await session.request(
            nodes[1].url, "tools/call", {"name": "slow", "arguments": {"seconds": 0.2, "steps": 4}}
        )
        assert "result" in (await slow.rest())[-1].message
        assert (await session.delete(nodes[1].url)).status == 200
