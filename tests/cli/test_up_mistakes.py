"""What is wrong with the served code is said once, however many nodes there would be."""

from __future__ import annotations

from pathlib import Path

from pgmcp.cli.options import PGMCP
from tests.harness.processes import ManagedProcess, free_ports


def test_a_mistake_is_said_once(empty_database: str, tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text("{}['MISSING_HERE']\n")
    [port] = free_ports(1)
    command = [*PGMCP, "up", f"{tmp_path / 'served.py'}:mcp", "--database-url", empty_database, "--port", str(port)]
    process = ManagedProcess(command, log_path=tmp_path / "log").start()
    assert process.wait(90) == 2
    first, place, *_, last, line, report = process.log.splitlines()
    assert first == "Traceback (most recent call last):"
    assert place == f'  File "{tmp_path / "served.py"}", line 1, in <module>'
    assert last == "KeyError: 'MISSING_HERE'"
    assert line.startswith("Error: The target ")
    assert report == "node-1 ended with code 2 before it was ready"
    assert process.log.count("Traceback") == 1
