"""Nodes that cannot start: one line and an exit code; and what ends one that waits or serves."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from pgmcp.store.commands import views
from tests.harness.processes import NodeProcess, free_ports
from tests.harness.waiting import wait_until

TARGET = "examples/everything.py:mcp"
LIFESPAN = """
from contextlib import asynccontextmanager
from mcp.server import MCPServer

@asynccontextmanager
async def lifespan(server):
    {body}

mcp = MCPServer("life", lifespan=lifespan)
"""


def node(target: str, database: str, folder: Path, port: int = 0, **env: str) -> NodeProcess:
    port = port or free_ports(1)[0]
    return NodeProcess(target, database_url=database, name="n", port=port, log_dir=folder, env=env)


def errors(log: str) -> list[str]:
    assert "Traceback (most recent call last):\n" not in log
    return [line for line in log.splitlines() if line.startswith("Error: ")]


def test_a_port_in_use_is_found_before_the_node_joins(database: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = node(TARGET, database, tmp_path, port)
        try:
            assert refused.start().wait(30) == 7, refused.log
        finally:
            refused.stop()
    [line] = errors(refused.log)
    assert line.startswith(f"Error: Port {port} of 127.0.0.1 is in use: another process listens there.")
    assert views.fetch(database, "pgmcp", "live_nodes") == []


def test_a_lifespan_that_fails_is_said_with_its_place(database: str, tmp_path: Path) -> None:
    served = tmp_path / "life.py"
    served.write_text(LIFESPAN.format(body='raise RuntimeError("no API key")\n    yield'))
    refused = node(f"{served}:mcp", database, tmp_path)
    try:
        assert refused.start().wait(30) == 8, refused.log
    finally:
        refused.stop()
    assert errors(refused.log) == [
        f"Error: The lifespan of the served server failed: RuntimeError: no API key ({served}:7, in lifespan)."
    ]
    assert len(refused.log.splitlines()) == 2, "the trace is one line of the log"


def test_a_lifespan_that_fails_at_its_end_costs_the_node_nothing_and_sighup_drains(
    database: str, tmp_path: Path
) -> None:
    served = tmp_path / "life.py"
    served.write_text(LIFESPAN.format(body='yield\n    raise RuntimeError("cannot close")'))
    with node(f"{served}:mcp", database, tmp_path) as started:
        started.signal(signal.SIGHUP)
        assert started.wait(30) == 0, started.log
        assert "node n has drained" in started.log
        assert "failed at its end: RuntimeError: cannot close" in started.log
        errors(started.log)
    assert views.fetch(database, "pgmcp", "live_nodes") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_node_that_waits_for_its_database_can_be_ended(tmp_path: Path, number: signal.Signals) -> None:
    waiting = node(TARGET, "postgresql://nobody@127.0.0.1:1/none", tmp_path, PGMCP_DRAIN_NOTCE="3")
    try:
        waiting.start()
        wait_until(lambda: "This node waits for it" in waiting.log, 30, lambda: waiting.log)
        waiting.signal(number)
        assert waiting.wait(10) == 0, waiting.log
    finally:
        waiting.stop()
    assert errors(waiting.log) == []
    assert "is PGMCP_DRAIN_NOTICE meant?" in waiting.log
