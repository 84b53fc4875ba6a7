"""FastMCP servers on several nodes: what they know of a session goes with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp.server.subscriptions import ToolsListChanged
from mcp_types import TextContent

from pgmcp import Cluster
from tests.harness.clients import RawSession, connect
from tests.harness.modern import Modern
from tests.harness.processes import NodeProcess, nodes

TARGET = "tests/harness/fast.py:mcp"


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    return tmp_path / "truth.jsonl"


@pytest.fixture
def three(database: str, truth: Path, tmp_path: Path) -> Iterator[list[NodeProcess]]:
    with nodes(TARGET, 3, database_url=database, log_dir=tmp_path, env={"TRUTH": str(truth)}) as members:
        yield members


@pytest.fixture
def guarded(database: str, truth: Path, tmp_path: Path) -> Iterator[list[NodeProcess]]:
    env = {"TRUTH": str(truth), "FAST_AUTH": "1"}
    with nodes(TARGET, 2, database_url=database, log_dir=tmp_path, env=env) as members:
        yield members


def lifespans(truth: Path) -> list[int]:
    return [json.loads(line)[1] for line in truth.read_text().splitlines()]


async def counted(session: RawSession, node: NodeProcess) -> dict[str, Any]:
    return dict((await session.call_tool(node.url, "count", 20))["structuredContent"])


async def test_a_session_goes_on_with_its_state_and_its_level_when_its_owner_is_killed(
    three: list[NodeProcess], truth: Path
) -> None:
    owner, *others = three
    async with RawSession() as session:
        await session.open(owner.url)
        await session.call(others[0].url, "logging/setLevel", {"level": "error"})
        before = [await counted(session, node) for node in three]
        assert [each["count"] for each in before] == [1, 2, 3]
        assert {each["pid"] for each in before} == {owner.pid}
        running = asyncio.create_task(session.call_tool(others[1].url, "wait", 20, seconds=0.5))
        owner.kill()
        after = [await counted(session, node) for node in others]
        assert [each["count"] for each in after] == [each["kept"] for each in after] == [4, 5]
        assert {each["session"] for each in before + after} == {session.session_id}
        assert {each["transport"] for each in before + after} == {"streamable-http"}
        assert len({each["pid"] for each in after}) == 1
        assert (await running)["content"][0]["text"] == "waited"
        async with await session.request(others[0].url, "tools/call", {"name": "log", "arguments": {}}) as exchange:
            events = [event.message for event in await exchange.rest(20)]
    levels = [each["params"]["level"] for each in events if each and each.get("method") == "notifications/message"]
    assert levels == ["error"]
    assert sorted(lifespans(truth)) == sorted(node.pid for node in three)  # once a node, whatever its sessions


async def test_a_caller_is_who_it_was_on_the_next_owner_and_nobody_else_gets_in(guarded: list[NodeProcess]) -> None:
    owner, other = guarded
    async with RawSession(headers={"authorization": "Bearer ada"}) as session:
        await session.open(owner.url)
        assert (await counted(session, other))["who"] == "client-ada"
        for headers, status in (({"authorization": "Bearer eve"}, 401), ({"authorization": "Bearer bob"}, 404)):
            refused = await session.post(
                other.url, {"jsonrpc": "2.0", "id": 99, "method": "tools/list"}, headers=headers
            )
            assert refused.status == status
        owner.kill()
        after = await counted(session, other)
    assert (after["who"], after["count"]) == ("client-ada", 2)


async def test_requests_without_a_session_know_their_caller_and_carry_state_to_any_node(
    guarded: list[NodeProcess], truth: Path
) -> None:
    async with Modern({"authorization": "Bearer ada"}) as ada, Modern({"authorization": "Bearer eve"}) as eve:
        for node in guarded:
            known = (await ada.result(node.url, "whoami"))["structuredContent"]
            assert known == {"transport": "streamable-http", "who": "client-ada"}
            assert (await eve.tool(node.url, "whoami")).status == 401
        asked = await ada.result(guarded[0].url, "confirm")
        told = {"inputResponses": {"ok": {"action": "accept", "content": {}}}, "requestState": asked["requestState"]}
        answer = await ada.call(guarded[1].url, "tools/call", {"name": "confirm", "arguments": {}, **told})
        assert answer["result"]["content"][0]["text"] == "confirmed"
    assert len(lifespans(truth)) == 2


async def test_clients_of_both_eras_hear_of_a_change_and_go_on_when_the_owner_is_killed(
    three: list[NodeProcess], database: str
) -> None:
    owner, edge, third = three
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        assert (await http.get(f"{third.url}/hello")).text == "hello"  # a route of its own
    async with RawSession() as session, connect(edge.mcp_url, mode="2026-07-28") as modern:
        await session.open(owner.url)
        assert (await counted(session, third))["count"] == 1
        standalone = await session.get(third.url)
        async with modern.listen(tools_list_changed=True) as stream:
            await Cluster(database).publish(ToolsListChanged())
            async with asyncio.timeout(10):
                assert isinstance(await anext(aiter(stream)), ToolsListChanged)
            await standalone.message("notifications/tools/list_changed")
        owner.kill()
        assert (await counted(session, edge))["count"] == 2
        again = await modern.call_tool("wait", {"seconds": 0.0})
        assert isinstance(again.content[0], TextContent)
        assert again.content[0].text == "waited"


async def test_the_example_keeps_its_notes(database: str, tmp_path: Path) -> None:
    with nodes("examples/notes.py:mcp", 2, database_url=database, log_dir=tmp_path) as (owner, other):
        async with RawSession() as session:
            await session.open(owner.url)
            await session.call_tool(other.url, "write", 20, text="milk")
            owner.kill()
            assert (await session.call_tool(other.url, "read", 20))["structuredContent"] == {"result": ["milk"]}
