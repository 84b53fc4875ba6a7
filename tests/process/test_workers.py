"""``pgmcp serve --workers``: several nodes on one port."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgmcp.store.commands import views
from tests.harness.clients import connect
from tests.harness.processes import NodeProcess, free_ports
from tests.harness.waiting import wait_until

TARGET = "examples/everything.py:mcp"


@pytest.fixture
def two(database: str, tmp_path: Path) -> Iterator[NodeProcess]:
    """A supervisor with two workers, both of them ready."""
    port = free_ports(1)[0]
    server = NodeProcess(TARGET, database_url=database, name="w", port=port, log_dir=tmp_path, args=("--workers", "2"))
    with server:
        server.wait_ready()
        wait_until(lambda: states(database) == {"w-1": "ready", "w-2": "ready"}, 20, "both workers are ready")
        yield server


def states(database: str) -> dict[str, str]:
    return {str(row["node_name"]): str(row["state"]) for row in views.fetch(database, "pgmcp", "live_nodes")}


def pids(database: str) -> dict[str, str]:
    """Node ids by name: a worker that was started again has a fresh one."""
    return {str(row["node_name"]): str(row["node_id"]) for row in views.fetch(database, "pgmcp", "live_nodes")}


def children(server: NodeProcess) -> list[int]:
    text = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


async def test_a_session_works_on_whichever_worker_a_connection_reaches(two: NodeProcess) -> None:
    for _ in range(3):
        async with connect(two.mcp_url) as client:
            counts = [(await client.call_tool("count", {})).structured_content for _ in range(4)]
            assert counts == [{"result": turn} for turn in (1, 2, 3, 4)]


def test_a_worker_that_dies_is_started_again(two: NodeProcess, database: str) -> None:
    before = set(pids(database).values())
    os.kill(children(two)[0], signal.SIGKILL)
    wait_until(lambda: len(set(pids(database).values()) - before) == 1, 20, "a new worker has joined")
    wait_until(lambda: len(children(two)) == 2, 20, "there are two workers again")


def test_one_signal_ends_all_of_them_in_order(two: NodeProcess, database: str) -> None:
    workers = children(two)
    assert os.getsid(two.pid) not in {os.getsid(pid) for pid in workers}, "Ctrl-C would be a second signal to them"
    assert two.terminate() == 0
    assert states(database) == {}, "not every worker said that it left"
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def refused(server: NodeProcess) -> tuple[int, str]:
    """Start what cannot start; its exit code and what it said."""
    server.start()
    try:
        return server.wait(30), server.log
    finally:
        server.stop()


def test_workers_that_cannot_start_end_the_whole(tmp_path: Path) -> None:
    url = "postgresql://nobody@127.0.0.1:1/none"
    port = free_ports(1)[0]
    args = ("--workers", "2", "--wait", "500ms")
    code, log = refused(NodeProcess(TARGET, database_url=url, name="w", port=port, log_dir=tmp_path, args=args))
    assert code == 3
    assert "does not answer" in log
    assert "has waited 0.5 s for it" in log
    assert "Traceback" not in log


def test_a_node_refuses_a_schema_that_it_does_not_understand(empty_database: str, tmp_path: Path) -> None:
    code, log = refused(
        NodeProcess(TARGET, database_url=empty_database, name="n", port=free_ports(1)[0], log_dir=tmp_path)
    )
    assert code == 4
    assert "pgmcp db upgrade" in log
    assert "Traceback" not in log
