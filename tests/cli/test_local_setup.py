"""What a local cluster stands on: found, or said, before anything is started for it."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from pgmcp.cli import local_setup, main
from pgmcp.cli.local_setup import local_cluster
from pgmcp.cli.signals import ended_by
from tests.harness.processes import free_ports

TARGET = "examples/everything.py:mcp"


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """A local cluster changes the process's signal handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize("target", ["nowhere.py:mcp", "no_such_module:mcp", "pgmcp", ".:mcp"])
def test_a_target_that_is_not_there_is_said_before_postgresql_starts(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGMCP_DATABASE_URL", raising=False)
    monkeypatch.setattr(local_setup, "EmbeddedPostgres", lambda *_, **__: pytest.fail("PostgreSQL was started"))
    result = CliRunner().invoke(main, ["up", target, "--port", "0"])
    assert result.exit_code == 2, result.output
    [line] = result.output.splitlines()
    assert target in line


def test_a_port_that_was_asked_for_and_is_in_use_is_said(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_setup, "EmbeddedPostgres", lambda *_, **__: pytest.fail("PostgreSQL was started"))
    for port in (listening, listening - 1):  # the second is a node's
        result = CliRunner().invoke(main, ["up", TARGET, "--port", str(port)])
        assert result.exit_code == 7, result.output
        [line] = result.output.splitlines()
        assert f"{listening}: Address already in use" in line


def test_free_ports_are_taken_where_the_usual_ones_are_in_use_and_nobody_is_waited_for(empty_database: str) -> None:
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # somebody else has it
            stack.enter_context(socket.create_server(("127.0.0.1", 8000)))
        given = {"database_url": empty_database}
        cluster, _ = stack.enter_context(local_cluster(given, TARGET, 2, said.append))
        entry = int(cluster.url.rpartition(":")[2].partition("/")[0])
        assert 8000 not in (entry, *cluster.ports)
        assert cluster.ports == [entry + 1, entry + 2]
        [line] = said
        assert str(entry) in line
        assert cluster.env["PGMCP_DRAIN_NOTICE"] == "0", "nobody but the entry port could notice"
    [port] = free_ports(1)
    with local_cluster(given | {"port": port, "drain_notice": 3.0}, TARGET, 1, said.append) as (cluster, _):
        assert cluster.ports == [port + 1]
        assert cluster.env.get("PGMCP_DRAIN_NOTICE") != "0"
        assert cluster.options[-1] == "3.0", "who asks for a notice gets it"
    assert len(said) == 1


def test_a_terminal_that_closes_ends_it_in_order_unless_that_is_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert set(ended_by()) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert set(ended_by()) == {signal.SIGINT, signal.SIGTERM}
