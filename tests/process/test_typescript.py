"""Both official TypeScript clients before three nodes, through nginx and through haproxy, in turn and with affinity.

Each run is one process of ``tests/harness/typescript/driver.mjs``: it goes through all scenarios and prints what it
saw; the tests here look at that.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from tests.harness.balancer import Exchange
from tests.harness.conformance import node_binary
from tests.harness.haproxy import Haproxy
from tests.harness.nginx import Nginx
from tests.harness.processes import REPOSITORY, nodes
from tests.harness.shipped import WITH_AFFINITY, Shipped

DRIVER = REPOSITORY / "tests/harness/typescript/driver.mjs"
PACKAGES = REPOSITORY / ".cache/typescript"
VERSIONS = {"@modelcontextprotocol/sdk": "1.32.2", "@modelcontextprotocol/client": "2.4.0"}
WATCHED = "test://watched-resource"
PATHS = {"http": "/mcp", "sse": "/sse"}
IN_TURN = ("nginx", "haproxy")
RUNS = [
    ("v1", "http", "nginx"),
    ("v2", "http", "haproxy"),
    ("v1", "sse", "haproxy"),
    ("v2", "sse", "nginx"),
    *((version, "http", name) for version, name in zip(("v1", "v2"), WITH_AFFINITY, strict=True)),
]
Balancer = Nginx | Haproxy | Shipped


def over(*kinds: str) -> pytest.MarkDecorator:
    """Every run over one of these transports."""
    return through((*IN_TURN, *WITH_AFFINITY), *kinds)


def through(balancers: Sequence[str], *kinds: str) -> pytest.MarkDecorator:
    """Every run over one of these transports through one of these balancers."""
    keys = [key for key in RUNS if key[1] in kinds and key[2] in balancers]
    return pytest.mark.parametrize("run", keys, ids="-".join, indirect=True)


@dataclass(frozen=True)
class Run:
    """What one run of the driver printed, by scenario."""

    kind: str
    scenarios: dict[str, dict[str, Any]]
    exchanges: list[Exchange]
    ports: Sequence[int]

    def __getitem__(self, scenario: str) -> Any:
        found = self.scenarios.get(scenario)
        assert found is not None, f"the driver never came to {scenario}: {list(self.scenarios)}"
        assert "error" not in found, found
        return found["result"]


@pytest.fixture(scope="module")
def balancers(shared_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Balancer]]:
    """Three nodes on one database, and nginx and haproxy in front of them, each in turn and with affinity."""
    logs = tmp_path_factory.mktemp("logs")
    with nodes(
        "examples/everything.py:mcp", 3, database_url=shared_database, log_dir=logs, env={"PGMCP_RETRY_MS": "300"}
    ) as members:
        names = {node.name: node.port for node in members}
        ports = list(names.values())
        with ExitStack() as stack:
            found: dict[str, Balancer] = {name: Shipped(name, names, logs / name) for name in WITH_AFFINITY}
            found |= {"nginx": Nginx(ports), "haproxy": Haproxy(ports)}
            for balancer in found.values():
                stack.enter_context(balancer)
            yield found


@pytest.fixture(scope="module")
def runs(balancers: dict[str, Balancer]) -> Callable[[tuple[str, str, str]], Run]:
    """Runs the driver once for each client, transport and balancer."""

    @cache
    def once(key: tuple[str, str, str]) -> Run:
        version, kind, name = key
        balancer = balancers[name]
        before = len(balancer.exchanges)
        scenarios = drive(version, kind, f"{balancer.url}{PATHS[kind]}")
        ports = balancer.ports.values() if isinstance(balancer, Shipped) else balancer.ports
        return Run(kind, scenarios, balancer.exchanges[before:], list(ports))

    return once


@pytest.fixture
def run(request: pytest.FixtureRequest, runs: Callable[[tuple[str, str, str]], Run]) -> Run:
    """One client over one transport through one balancer."""
    return runs(request.param)


def drive(version: str, kind: str, url: str) -> dict[str, dict[str, Any]]:
    """Run the driver and read its lines."""
    node = node_binary()
    assert node is not None, "node 22 or newer is missing: `make test` installs it"
    for package, wanted in VERSIONS.items():
        manifest = PACKAGES / "node_modules" / package / "package.json"
        assert manifest.is_file(), f"{package} is not installed: run `make test`"
        assert json.loads(manifest.read_text())["version"] == wanted, f"{package} is not {wanted}: run `make test`"
    with DRIVER.open("rb") as driver:
        finished = subprocess.run(
            [node, "--input-type=module", "-", version, kind, url],
            check=False,
            cwd=PACKAGES,
            stdin=driver,
            capture_output=True,
            timeout=45,
            text=True,
        )
    assert finished.returncode == 0, f"exit {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    return {line["scenario"]: line for line in lines}


@through(IN_TURN, "http", "sse")
def test_in_turn_the_whole_run_uses_every_node(run: Run) -> None:
    assert {exchange.ports[-1] for exchange in run.exchanges} == set(run.ports)


@through(WITH_AFFINITY, "http", "sse")
def test_with_affinity_the_hint_leads_a_client_that_keeps_no_cookies_to_the_owner(run: Run) -> None:
    used = Counter(exchange.ports[-1] for exchange in run.exchanges if exchange.method != "GET" or run.kind == "http")
    [(_, most)] = used.most_common(1)
    # Over HTTP+SSE a run has other clients, too, and the reconnection of one.
    assert most >= used.total() - (0 if run.kind == "http" else 12), used
    assert used.total() > 60


@over("http", "sse")
def test_nothing_is_refused(run: Run) -> None:
    assert run["connect"] == {"server": "everything", "session": run.kind == "http"}
    assert all(len(exchange.ports) == 1 for exchange in run.exchanges), "an exchange was tried on a second node"
    hung_up = {499, -1}
    assert {exchange.status for exchange in run.exchanges} <= {200, 202, 204} | hung_up


@over("http", "sse")
def test_tools(run: Run) -> None:
    found = run["tools"]
    assert {"count", "slow", "test_simple_text"} <= set(found["tools"])
    assert found["text"] == "This is a simple text response for testing."
    assert found["isError"]
    first = found["counted"][0]
    assert found["counted"] == list(range(first, first + 6))
    assert first == 1 or run.kind == "sse", "the everything server tells sessions apart by a header that SSE has not"


@over("http", "sse")
def test_prompts_resources_completion_ping_and_errors(run: Run) -> None:
    found = run["others"]
    assert found["unknown"] is not None, "an unknown prompt is an error"
    assert found["prompt"] == "Prompt with arguments: arg1='a', arg2='b'"
    assert "Data for ID: 7" in found["resource"]
    assert found["completed"] == ["paris", "park", "party"]
    assert found["pong"] == {}


@over("http", "sse")
def test_progress_arrives_in_order_and_before_the_result(run: Run) -> None:
    steps = list(range(1, 11))
    for call in run["progress"]:
        assert call["answer"] == "10 steps in 0.1 s"
        assert call["wire"] == [*steps, "answer"]
        # These clients forget a call in the same tick in which its answer comes: over HTTP+SSE a report that arrives
        # together with the answer is dropped, also with a single process of the SDK.
        assert call["told"] in ([steps] if run.kind == "http" else [steps, steps[:-1]])


@over("http", "sse")
def test_calls_at_the_same_time_get_their_own_answers(run: Run) -> None:
    assert run["parallel"] == [f"1 steps in {0.02 * n:g} s" for n in range(9, 0, -1)]


@over("http", "sse")
def test_elicitation(run: Run) -> None:
    said = 'User response: action=accept, content={"username": "username", "email": "email"}'
    assert run["elicitation"] == [said] * 3


@over("http", "sse")
def test_sampling(run: Run) -> None:
    assert run["sampling"] == ["LLM response: 1 message"] * 3


@over("http", "sse")
def test_roots(run: Run) -> None:
    assert run["roots"] == [["file:///root"]] * 3


@over("http", "sse")
def test_resource_updates_reach_subscribers_until_they_unsubscribe(run: Run) -> None:
    assert run["notifications"] == {"updated": [WATCHED] * 3}


@over("http", "sse")
def test_log_messages_obey_the_level_of_the_session(run: Run) -> None:
    logged = ["Tool execution started", "Tool processing data", "Tool execution completed"]
    assert run["logging"] == {"quiet": 0, "logged": logged}


@over("http", "sse")
def test_a_cancelled_call_stops_at_its_owner(run: Run) -> None:
    assert run["cancel"] == [{"before": 1, "outcome": "cancelled"}] * 3


@over("http")
def test_a_call_whose_stream_the_server_closes_is_answered_after_the_client_came_back(run: Run) -> None:
    assert run["closed"]["answer"] == "This answer came after the stream was closed."
    assert run["closed"]["resumed"] >= 1


@over("http")
def test_after_a_cut_of_every_connection_the_client_goes_on(run: Run) -> None:
    cut, afterwards = run["cut"], run["afterwards"]
    assert cut["answer"] == "9 steps in 0.9 s"
    assert cut["told"] == list(range(1, 10))
    assert cut["wire"] == [*range(1, 10), "answer"]
    assert cut["resumed"] >= 2
    assert afterwards == {"updated": [WATCHED], "counted": 7}
    assert run["terminate"] == {"sessionId": None}


@over("sse")
def test_after_a_cut_of_http_sse_the_client_starts_anew(run: Run) -> None:
    """These clients come back without Last-Event-ID and without initialize; they must hear of it, and not hang."""
    assert run["cut"]["code"] == -32602
    assert run["cut"]["resumed"] == 0
    assert run["anew"]["tools"] == len(run["tools"]["tools"])
