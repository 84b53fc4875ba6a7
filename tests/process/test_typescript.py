"""Both official TypeScript clients, through nginx and through haproxy without stickiness, in front of three nodes.

Each run is one process of ``tests/harness/typescript/driver.mjs``: it goes through all scenarios and prints what it
saw; the tests here look at that.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pytest_postgresql.executors import NoopExecutor

from tests.conftest import _temporary
from tests.harness.conformance import node_binary
from tests.harness.haproxy import Haproxy
from tests.harness.nginx import Nginx
from tests.harness.processes import REPOSITORY, nodes

DRIVER = REPOSITORY / "tests/harness/typescript/driver.mjs"
PACKAGES = REPOSITORY / ".cache/typescript"
VERSIONS = {"@modelcontextprotocol/sdk": "1.32.2", "@modelcontextprotocol/client": "2.4.0"}
WATCHED = "test://watched-resource"
PATHS = {"http": "/mcp", "sse": "/sse"}
RUNS = [
    (version, kind, balancer)
    for balancer in ("nginx", "haproxy")
    for kind in ("http", "sse")
    for version in ("v1", "v2")
]


@dataclass(frozen=True)
class Run:
    """What one run of the driver printed, by scenario."""

    version: str
    kind: str
    scenarios: dict[str, dict[str, Any]]

    def __getitem__(self, scenario: str) -> Any:
        found = self.scenarios.get(scenario)
        assert found is not None, f"the driver never came to {scenario}: {list(self.scenarios)}"
        assert "error" not in found, found
        return found["result"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_database(template: NoopExecutor) -> AsyncIterator[str]:
    """The address of a migrated database of the module's own."""
    async for address in _temporary(template.template_dbname):
        yield address


@pytest.fixture(scope="module")
def balancers(shared_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Nginx | Haproxy]]:
    """Three nodes on one database, and nginx and haproxy in front of them."""
    logs = tmp_path_factory.mktemp("logs")
    with nodes(
        "examples/everything.py:mcp", 3, database_url=shared_database, log_dir=logs, env={"PGMCP_RETRY_MS": "300"}
    ) as members:
        ports = [node.port for node in members]
        with Nginx(ports) as nginx, Haproxy(ports) as haproxy:
            yield {"nginx": nginx, "haproxy": haproxy}


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(request: pytest.FixtureRequest, balancers: dict[str, Nginx | Haproxy]) -> Run:
    """One client over one transport through one balancer."""
    version, kind, name = request.param
    balancer = balancers[name]
    before = len(balancer.exchanges)
    scenarios = drive(version, kind, f"{balancer.url}{PATHS[kind]}")
    assert {exchange.ports[-1] for exchange in balancer.exchanges[before:]} == set(balancer.ports)
    return Run(version, kind, scenarios)


@pytest.fixture
def only(run: Run) -> Callable[[str], bool]:
    """Whether the run is over a certain transport."""
    return lambda kind: run.kind == kind


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


def test_dump(run: Run) -> None:
    for line in run.scenarios.values():
        print(json.dumps(line))
