"""Clients of both eras on the same nodes at once, through a balancer without stickiness."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp import types

from tests.harness.clients import connect
from tests.harness.conformance import node_binary
from tests.harness.nginx import Nginx
from tests.harness.processes import REPOSITORY, NodeProcess, nodes

ERAS = REPOSITORY / "tests/harness/typescript/eras.mjs"
PACKAGES = REPOSITORY / ".cache/typescript"
MODERN, CALLS = "2026-07-28", 6


@pytest.fixture(scope="module")
def balancer(shared_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """Three nodes on one database, and nginx in front of them."""
    logs = tmp_path_factory.mktemp("logs")
    with (
        nodes("examples/everything.py:mcp", 3, database_url=shared_database, log_dir=logs) as members,
        Nginx([node.port for node in members]) as nginx,
    ):
        yield nginx


async def accept(context: object, params: types.ElicitRequestParams) -> types.ElicitResult:
    """Confirm everything."""
    assert isinstance(params, types.ElicitRequestFormParams)
    return types.ElicitResult(action="accept", content=dict.fromkeys(params.requested_schema["properties"], True))


def test_both_typescript_clients_at_once(balancer: Nginx) -> None:
    node = node_binary()
    assert node is not None
    with ERAS.open("rb") as script:
        finished = subprocess.run(
            [node, "--input-type=module", "-", balancer.mcp_url, str(CALLS)],
            check=False, cwd=PACKAGES, stdin=script, capture_output=True, timeout=70, text=True,
        )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    seen = json.loads(finished.stdout)
    assert seen["counted"] == list(range(1, CALLS + 1))
    assert all("action=accept" in said for said in seen["asked"])
    assert seen["said"] == ["This is a simple text response for testing."] * CALLS
    assert seen["confirmed"] == ["state-ok"] * CALLS
    assert seen["progress"] == [[0, 50, 100]] * CALLS
    assert {(verb, version, session) for verb, version, session in seen["modern"]} == {("POST", MODERN, False)}
    assert all(version in {None, "2025-11-25"} for _, version, _ in seen["old"])
    assert any(session for _, _, session in seen["old"])
    assert {exchange.ports[-1] for exchange in balancer.exchanges} == set(balancer.ports)


async def test_a_python_client_takes_the_newest_revision_and_may_ask_for_a_session(balancer: Nginx) -> None:
    async with (
        connect(balancer.mcp_url, mode="auto", elicitation_callback=accept) as modern,
        connect(balancer.mcp_url, mode="legacy", elicitation_callback=accept) as old,
    ):
        assert (modern.protocol_version, old.protocol_version) == (MODERN, "2025-11-25")

        async def confirmed() -> str:
            answer = await modern.call_tool("test_input_required_result_request_state")
            assert isinstance(answer.content[0], types.TextContent)
            return answer.content[0].text

        async def counted() -> list[object]:
            return [(await old.call_tool("count")).structured_content for _ in range(10)]

        said, counts = await asyncio.gather(asyncio.gather(*(confirmed() for _ in range(10))), counted())
        assert said == ["state-ok"] * 10
        assert counts == [{"result": number} for number in range(1, 11)]


async def test_a_call_in_several_rounds_outlives_a_restart_of_all_nodes(database: str, tmp_path: Path) -> None:
    """What one generation of processes asked is answered to the next, which opens what it did not seal."""
    with (
        nodes("examples/everything.py:mcp", 2, database_url=database, log_dir=tmp_path) as members,
        Nginx([member.port for member in members]) as nginx,
    ):
        asked, restarted = asyncio.Event(), asyncio.Event()

        async def slowly(context: object, params: types.ElicitRequestParams) -> types.ElicitResult:
            asked.set()
            await restarted.wait()
            return await accept(context, params)

        async with connect(nginx.mcp_url, mode="auto", elicitation_callback=slowly) as client:
            call = asyncio.create_task(client.call_tool("test_input_required_result_request_state"))
            await asyncio.wait_for(asked.wait(), 20)
            restart(members)
            restarted.set()
            answer = await call
        assert isinstance(answer.content[0], types.TextContent)
        assert answer.content[0].text == "state-ok"


def restart(members: list[NodeProcess]) -> None:
    """Kill every node, then start them again."""
    for member in members:
        member.kill()
    for member in members:
        member.start()
    for member in members:
        member.wait_ready()
