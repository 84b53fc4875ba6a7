"""The official conformance suite, through a balancer without stickiness, in front of three nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import conformance
from tests.harness.nginx import Nginx
from tests.harness.plain import PlainProcess
from tests.harness.processes import ServerProcess, free_ports, nodes, running

SCORES = {
    "2025-03-26": (3, 0, 0),
    "2025-06-18": (56, 0, 0),
    "2025-11-25": (84, 0, 0),
}
MODERN = "2026-07-28"
MODERN_SCORE = (152, 0, 0)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def balancer(database: str, tmp_path: Path) -> Iterator[Nginx]:
    """Three nodes on one database, and nginx in front of them."""
    with (
        nodes("examples/everything.py:mcp", 3, database_url=database, log_dir=tmp_path / "logs") as members,
        Nginx([node.port for node in members]) as nginx,
    ):
        yield nginx


def check(server: ServerProcess, revision: str, score: tuple[int, int, int], out: Path) -> None:
    """Run one revision and compare; the message names each check that is not green."""
    tally = conformance.run(server.mcp_url, revision, out / revision)
    assert tally.score == score, f"{revision}: {tally}"


def test_three_nodes_conform_to_every_revision(balancer: Nginx, tmp_path: Path) -> None:
    for revision, score in {**SCORES, MODERN: MODERN_SCORE}.items():
        check(balancer, revision, score, tmp_path)
    finished = balancer.exchanges
    assert {exchange.ports[-1] for exchange in finished} == set(balancer.ports), "not every node was used"
    assert all(len(exchange.ports) == 1 for exchange in finished), "an exchange was tried on a second node"


@pytest.mark.control
def test_control_one_process_of_the_sdk_conforms(tmp_path: Path) -> None:
    with PlainProcess(port=free_ports(1)[0], log_dir=tmp_path) as server:
        for revision, score in {**SCORES, MODERN: MODERN_SCORE}.items():
            check(server, revision, score, tmp_path)


@pytest.mark.control
def test_control_two_processes_of_the_sdk_fail_behind_the_balancer(tmp_path: Path) -> None:
    members = [PlainProcess(port=port, log_dir=tmp_path) for port in free_ports(2)]
    with running(members), Nginx([member.port for member in members]) as nginx:
        tally = conformance.run(nginx.mcp_url, "2025-11-25", tmp_path / "out")
    assert len(tally.scenarios) == 33
    assert all(checks["FAILURE"] for checks in tally.scenarios.values()), "the harness cannot see a failure"
