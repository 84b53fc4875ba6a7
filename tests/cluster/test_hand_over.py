"""Hand-over where it is difficult: owners that are still restoring, targets that leave, memory that is old."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mcp.server.mcpserver import MCPServer

from pgmcp import SessionState, keep_memory, session_state
from pgmcp.cluster.lease import LeaseState
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, tables_of
from tests.harness.waiting import eventually


class Memory:
    """Servers that count in memory; a test can hold their restores."""

    def __init__(self) -> None:
        self.restored: list[Any] = []
        self.restoring = 0
        self.free = asyncio.Event()
        self.free.set()

    def server(self) -> MCPServer:
        server, counts = MCPServer("memory"), dict[str, int]()

        @server.tool(structured_output=False)
        async def count() -> str:
            """Count in memory."""
            session = session_state().session_id
            counts[session] = counts.get(session, 0) + 1
            return str(counts[session])

        async def export(state: SessionState) -> int:
            return counts[state.session_id]

        async def restore(state: SessionState, exported: Any) -> None:
            self.restoring += 1
            await self.free.wait()
            self.restored.append(exported)
            counts[state.session_id] = exported or 0

        keep_memory(server, export=export, restore=restore)
        return server


class Scene:
    """Three nodes, and a session of the first one."""

    def __init__(self, memory: Memory, nodes: list[RunningNode], tables: Tables, session: RawSession) -> None:
        self.memory, self.nodes, self.tables, self.session = memory, nodes, tables, session

    async def count(self, node: RunningNode) -> str:
        return str((await self.session.call_tool(node.url, "count"))["content"][0]["text"])

    async def owner(self) -> tuple[str, int]:
        [row] = await self.tables.rows("select node_name, epoch from pgmcp.live_sessions")
        return row["node_name"], row["epoch"]

    async def unready(self, node: RunningNode) -> None:
        await self.tables.execute(
            "update pgmcp.nodes set state = 'draining' where node_id = $1", node.incarnation.node_id
        )


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    memory = Memory()
    async with contextlib.AsyncExitStack() as stack:
        # no poll: a row that says "draining" would make the node end this process
        nodes = await stack.enter_async_context(cluster(database, memory.server, 3, drain_notice=0, poll=600))
        tables = await stack.enter_async_context(tables_of(database))
        session = await stack.enter_async_context(RawSession())
        await session.open(nodes[0].url)
        yield Scene(memory, list(nodes), tables, session)


async def test_a_session_that_is_being_restored_is_waited_for_and_given_on(scene: Scene) -> None:
    first, second, third = scene.nodes
    assert await scene.count(first) == "1"
    await scene.unready(third)
    scene.memory.free.clear()
    await first.node.drain()
    assert await scene.owner() == ("n2", 2)
    await eventually(lambda: scene.memory.restoring, "the second node restores it")
    await scene.tables.execute("update pgmcp.nodes set state = 'ready' where node_id = $1", third.incarnation.node_id)
    leaving = asyncio.create_task(second.node.drain())
    calling = asyncio.create_task(scene.count(third))
    await eventually(lambda: second.node.unready() == "draining", "the second node leaves, too")
    scene.memory.free.set()
    await leaving
    assert await scene.owner() == ("n3", 3)
    assert await calling == "2"
    await eventually(lambda: scene.memory.restored in ([1, 1], [1, 2]), "it counted before it was given on, or after")


async def test_a_session_given_to_a_node_that_leaves_before_it_hears_of_it_is_taken_over(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = scene.nodes
    assert await scene.count(first) == "1"
    await scene.unready(third)
    monkeypatch.setattr(second.incarnation.host, "take_on", lambda _: None)
    await first.node.drain()
    assert await scene.owner() == ("n2", 2)
    await scene.tables.execute("update pgmcp.nodes set state = 'ready' where node_id = $1", third.incarnation.node_id)
    await second.leave()
    assert await scene.count(third) == "2", "what the first node exported is still there"
    assert await scene.owner() == ("n3", 3)


async def test_memory_that_was_handed_over_is_not_restored_again_after_a_death(scene: Scene) -> None:
    first, second, third = scene.nodes
    assert await scene.count(first) == "1"
    await scene.unready(third)
    await first.node.drain()
    assert [await scene.count(second), await scene.count(second)] == ["2", "3"]
    await scene.tables.execute("update pgmcp.nodes set state = 'ready' where node_id = $1", third.incarnation.node_id)
    dead = second.incarnation
    await scene.tables.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", dead.node_id)
    await eventually(lambda: dead.lease.state is LeaseState.FENCED, "the node knows")
    assert await scene.count(third) == "1", "better nothing than what is old"
    assert scene.memory.restored == [1, None]


async def test_messages_that_come_during_a_hand_over_are_answered_once_and_in_order(scene: Scene) -> None:
    first, second, third = scene.nodes
    scene.memory.free.clear()
    leaving = asyncio.create_task(first.node.drain())
    calls = [asyncio.create_task(scene.count(node)) for node in (second, third) * 10]
    await eventually(lambda: scene.memory.restoring, "the next owner restores it")
    scene.memory.free.set()
    assert sorted(int(one) for one in await asyncio.gather(*calls)) == list(range(1, 21))
    await leaving


async def test_an_exchange_that_comes_when_the_edge_has_left_goes_on_elsewhere(scene: Scene) -> None:
    first, second, _ = scene.nodes
    await first.node.drain()
    late = await scene.session.request(first.url, "tools/call", {"name": "count", "arguments": {}}, request_id=70)
    await late.rest(2)
    assert late.error is None
    assert late.last_event_id is not None
    resumed = await scene.session.get(second.url, late.last_event_id)
    assert "result" in await resumed.response(70)
    standalone = await scene.session.get(first.url)
    await standalone.rest(2)
    assert standalone.error is None


async def test_a_node_whose_readiness_was_lost_says_it_again(database: str) -> None:
    """A failover may lose that a node is ready, and not that it has joined."""
    async with cluster(database, Memory().server, 1, poll=0.1) as (node,), tables_of(database) as tables:
        which = node.incarnation.node_id
        await tables.execute("update pgmcp.nodes set state = 'joining' where node_id = $1", which)

        async def ready() -> bool:
            [row] = await tables.rows("select state from pgmcp.nodes where node_id = $1", which)
            return bool(row["state"] == "ready")

        await eventually(ready, "the node says that it is ready")
