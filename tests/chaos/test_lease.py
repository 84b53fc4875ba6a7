"""Nodes that cannot renew their lease, though they run: frozen, or cut off from PostgreSQL; and one that still can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from pgmcp.settings import Settings
from tests.chaos.figures import ROUNDS, took
from tests.chaos.stage import Call, Case, Stage, step, text_of
from tests.harness.clients import RawSession
from tests.harness.processes import NodeProcess
from tests.harness.proxy import Proxy, proxied
from tests.harness.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="package")

TTL = Settings(database_url="postgresql://none").ttl
LONG = 60.0
FIRST_BYTE = "owner dead (frozen): first byte of a stream that is resumed elsewhere"
LATE = """
select count(*) from pgmcp.takeovers t
join pgmcp.streams s on s.session = t.session
join pgmcp.events e on e.stream = s.id and e.stored_at > t.at
where t.session_id = $1 and t.from_node = $2 and position($3::bytea in e.message) > 0
"""
"""What a node has stored in a session that was taken from it; under a new id the process may run others."""


@dataclass
class Far:
    """A node with a proxy between it and PostgreSQL."""

    node: NodeProcess
    proxy: Proxy


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def far(shared_stage: Stage, chaos_database: str) -> AsyncIterator[Far]:
    """One more node, all of whose connections lead through a proxy."""
    async with proxied(chaos_database) as (proxy, address):
        yield Far(shared_stage.add(1, PGMCP_DATABASE_URL=address)[0], proxy)
        shared_stage.remove(1)


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def deaf(shared_stage: Stage, chaos_database: str, far: Far) -> AsyncIterator[Far]:
    """One more node, only whose line leads through a proxy."""
    async with proxied(chaos_database) as (proxy, address):
        yield Far(shared_stage.add(1, PGMCP_LISTEN_URL=address)[0], proxy)
        shared_stage.remove(1)


async def short_freeze(stage: Stage, node: NodeProcess, edge: NodeProcess) -> None:
    """Shorter than the lease: nothing moves, and what ran goes on."""
    node_id = await stage.node_id(node)
    async with stage.session(node, edge) as session:
        call = await stage.call(session, edge, "unsafe", text=text_of("unsafe"), first=1.0)
        await stage.happened("start", call.text)
        await stage.frozen(node)
        waiting = await stage.call(session, edge, "unsafe", text=text_of("unsafe"))
        await asyncio.sleep(3.0)
        node.resume()
        for one in (call, waiting):
            assert await one.result() == (one.text, node.pid)
            assert stage.truth("start", one.text) == [node.pid]
        assert await stage.node_id(node) == node_id
        assert await stage.owner_of(session) == node.name
        assert await stage.tables.value("select count(*) from pgmcp.takeovers where from_node = $1", node_id) == 0


class Lost:
    """The sessions of a node that will lose its lease, and what must become of them."""

    def __init__(self, stage: Stage, node: NodeProcess, edges: list[NodeProcess], what: str) -> None:
        self._stage, self._node, self._edges, self._what = stage, node, edges, what

    async def run(self, strike: Case, *, resumes: bool = False) -> None:
        """Strike between the two steps of ``strike``, and let the node come back at its end."""
        stage, node, edge, other = self._stage, self._node, *self._edges
        node_id = await stage.node_id(node)
        async with stage.session(node, edge) as session, stage.session(node, edge) as idle:
            await idle.call_tool(edge.url, "count")
            safe = await stage.call(session, edge, "safe", text=text_of("safe"), first=TTL / 2)
            unsafe = await stage.call(session, edge, "unsafe", text=text_of("unsafe"), first=TTL / 2)
            steps = await stage.call(session, edge, "steps", text=text_of("steps"), count=100, seconds=0.2, stall=0)
            mutter = await stage.call(session, edge, "mutter", text=text_of("unsafe"))
            for call in (safe, unsafe, steps, mutter):
                await stage.happened("start", call.text)
            await steps.method("notifications/progress")
            async with await session.get(edge.url) as standalone:
                await standalone.message("notifications/message")
            await anext(strike)
            began = asyncio.get_running_loop().time()
            if resumes:
                await self._resume(steps, other)
            await self._moved(began, safe, unsafe, idle, edge)
            await anext(strike, None)
            await self._comes_back(node_id)
            await steps.answer()
            told = [message["params"]["progress"] for message in steps.messages if "method" in message]
            assert told == sorted(set(told))
            for call in (unsafe, mutter):
                assert (await call.answer())["error"]["data"]["reason"] == "owner_lost"
                assert stage.truth("start", call.text) == [node.pid]
            late = await stage.tables.value(LATE, session.session_id, node_id, f" {node.pid}".encode())
            assert late == 0, "a zombie has written"
            assert (await idle.call_tool(node.url, "count", 30))["structuredContent"]["kept"] == 3

    async def _resume(self, call: Call, node: NodeProcess) -> None:
        began = asyncio.get_running_loop().time()
        await call.resume(node)
        await call.next()
        took(FIRST_BYTE, asyncio.get_running_loop().time() - began, most=0.1)

    async def _moved(self, began: float, safe: Call, unsafe: Call, idle: RawSession, edge: NodeProcess) -> None:
        loop = asyncio.get_running_loop()

        async def served() -> None:
            counted = (await idle.call_tool(edge.url, "count", 60))["structuredContent"]
            took(f"owner {self._what}: its session is served again", loop.time() - began, most=TTL + 2)
            assert (counted["kept"], counted["restored"]) == (2, True)

        async def ended() -> None:
            answer = await unsafe.answer()
            took(f"owner {self._what}: an unsafe call ends with its error", loop.time() - began, most=TTL + 3)
            assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}

        async def again() -> None:
            text, pid = await safe.result()
            assert self._stage.truth("start", text) == [self._node.pid, pid]
            assert pid != self._node.pid

        async with asyncio.TaskGroup() as group:
            for work in (served(), ended(), again()):
                group.create_task(work)

    async def _comes_back(self, node_id: object) -> None:
        stage, node = self._stage, self._node

        async def new() -> bool:
            found = await stage.tables.value(
                "select node_id from pgmcp.live_nodes where node_name = $1 and state = 'ready'", node.name
            )
            return found is not None and found != node_id

        await eventually(new, f"{node.name} is a new node\n{node.log[-2000:]}", 20)
        state, cause = (await stage.tables.rows("select state, cause from pgmcp.nodes where node_id = $1", node_id))[0]
        assert (state, cause) == ("dead", "lease")


async def freeze(stage: Stage, node: NodeProcess) -> Case:
    """Stop a process, and let it go on later."""
    await stage.frozen(node)
    yield
    node.resume()


async def cut(far: Far) -> Case:
    """Swallow all that a node and PostgreSQL say to each other, and let it through later."""
    far.proxy.black_hole = True
    yield
    far.proxy.black_hole = False


async def without_line(stage: Stage, deaf: Far, edge: NodeProcess) -> None:
    """Only the line is cut, for longer than a lease: the node renews on its pool, and polls."""
    node_id = await stage.node_id(deaf.node)
    loop = asyncio.get_running_loop()
    async with stage.session(deaf.node, edge) as session:
        await session.call_tool(edge.url, "count")
        deaf.proxy.refusing = True
        deaf.proxy.cut_all()
        end, calls = loop.time() + TTL + 2, 1
        while loop.time() < end:
            began, calls = loop.time(), calls + 1
            counted = (await session.call_tool(edge.url, "count", 30))["structuredContent"]
            took("owner without a line: a call", loop.time() - began, most=3.0)
            assert (counted["memory"], counted["restored"]) == (calls, False)
        deaf.proxy.refusing = False
        assert await stage.node_id(deaf.node) == node_id
        assert await stage.state_of(node_id) == "ready"


async def hanging(stage: Stage, node: NodeProcess, edge: NodeProcess) -> Case:
    """The server does not come back from the first restore: that is given up, and the next one succeeds."""
    async with stage.session(node, edge) as session:
        await session.call_tool(edge.url, "mark", 10, what="hang")
        call = await stage.call(session, edge, "safe", text=text_of("safe"), first=TTL * 2)
        await stage.happened("start", call.text)
        yield
        text, pid = await call.result()
        assert stage.truth("start", text) == [node.pid, pid]
        assert len(stage.truth("restore", str(session.session_id))) == 2


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_leases(stage: Stage, far: Far, deaf: Far, turn: int) -> None:
    frozen, *edges = stage.nodes[turn % 4 : 4] + stage.nodes[: turn % 4]
    await short_freeze(stage, frozen, edges[0])
    hangs = hanging(stage, far.node, edges[1])
    await step(hangs)
    async with asyncio.TaskGroup() as group:
        first = Lost(stage, frozen, edges[:2], "frozen")
        second = Lost(stage, far.node, edges[:2], "cut off")
        group.create_task(step(hangs))
        group.create_task(first.run(freeze(stage, frozen), resumes=True))
        group.create_task(second.run(cut(far)))
        group.create_task(without_line(stage, deaf, edges[2]))
