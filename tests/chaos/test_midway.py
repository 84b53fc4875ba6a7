"""Nodes that die while they take over what others left."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.chaos.figures import ROUNDS, took
from tests.chaos.stage import Stage, text_of
from tests.harness.processes import NodeProcess
from tests.harness.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="package")

LONG = 60.0


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_a_node_dies_in_the_middle_of_a_takeover(stage: Stage, turn: int) -> None:
    """In every other round somewhere in the middle, else inside the replay."""
    owner, edge, *_ = stage.nodes[turn % 4 :] + stage.nodes[: turn % 4]
    async with stage.session(owner, edge) as session:
        if turn % 2 == 0:
            await session.call_tool(edge.url, "mark", 10, what="hang")
        safe = await stage.call(session, edge, "safe", text=text_of("safe"), first=LONG, again=0.1)
        unsafe = await stage.call(session, edge, "unsafe", text=text_of("unsafe"), first=LONG)
        for call in (safe, unsafe):
            await stage.happened("start", call.text)
        stage.kill(owner)
        late = await stage.call(session, edge, "unsafe", text=text_of("unsafe"))
        if turn % 2 == 0:
            await stage.happened("restore", str(session.session_id))
            taker = stage.by_pid(stage.truth("restore", str(session.session_id))[0])
        else:
            name = await eventually(lambda: _taken(stage, str(session.session_id)), "it is taken over", 30)
            taker = next(node for node in stage.nodes if node.name == name)
            await asyncio.sleep(random.uniform(0, 0.1))
        stage.kill(taker)
        answer = await unsafe.answer()
        took("taker killed: an unsafe call ends with its error", stage.since(), most=3.0)
        assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
        assert stage.truth("start", unsafe.text) == [owner.pid]
        again = await safe.answer()
        starts = stage.truth("start", safe.text)
        if turn % 2 == 0:
            assert again["result"]["content"][0]["text"] == f"{safe.text} {starts[1]}"
        assert starts[0] == owner.pid
        assert len(starts) <= 2
        answer, started = await late.answer(), stage.truth("start", late.text)
        if turn % 2 and "error" in answer:  # the taker was through, and had begun with it
            assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
            assert started in ([], [taker.pid])
        else:
            assert answer["result"]["content"][0]["text"] == f"{late.text} {started[0]}"
            assert len(started) == 1


async def _taken(stage: Stage, session_id: str) -> str | None:
    query = """
        select n.name from pgmcp.takeovers t join pgmcp.nodes n on n.node_id = t.to_node where t.session_id = $1
    """
    taker: str | None = await stage.tables.value(query, session_id)
    return taker


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_a_call_that_kills_its_node_kills_two(stage: Stage, turn: int) -> None:
    owner, edge, *_ = stage.nodes[turn % 4 :] + stage.nodes[: turn % 4]
    async with stage.session(owner, edge) as session, stage.session(edge, owner) as other:
        await other.call_tool(owner.url, "count")
        call = await stage.call(session, edge, "deadly", text=text_of("deadly"))
        answer = await call.answer()
        assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 2}
        first, second = stage.truth("start", call.text)
        assert first == owner.pid != second
        living = stage.living()
        assert len(living) == 2
        for client in (session, other):
            await client.call_tool(living[0].url, "count", 30)


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_a_session_that_kills_whoever_restores_it_kills_three(stage: Stage, turn: int) -> None:
    """Nodes that die are started again, as a supervisor does."""
    owner, *others = stage.nodes[turn % 4 :] + stage.nodes[: turn % 4]
    guard = asyncio.create_task(_supervise(stage, stage.nodes))
    try:
        async with stage.session(owner, others[0]) as session, stage.session(others[1], others[2]) as bystander:
            await session.call_tool(owner.url, "mark", 10, what="poison")
            await bystander.call_tool(owner.url, "count")
            stage.kill(owner)
            waiting = await stage.call(session, others[0], "unsafe", text=text_of("unsafe"))
            restores = str(session.session_id)
            await eventually(lambda: len(stage.truth("restore", restores)) == 3, "it was restored three times", 60)
            await eventually(lambda: _gone(stage, restores), "the session is over", 30)
            assert len(set(stage.truth("restore", restores))) == 3
            assert stage.truth("start", waiting.text) == []
            await stage.ready()
            for node in stage.nodes:
                exchange = await session.get(node.url)
                assert exchange.status == 404
                counted = (await bystander.call_tool(node.url, "count", 30))["structuredContent"]
            assert counted["kept"] == 5
    finally:
        guard.cancel()


async def _gone(stage: Stage, session_id: str) -> bool:
    return not await stage.tables.value("select count(*) from pgmcp.sessions where session_id = $1", session_id)


async def _supervise(stage: Stage, nodes: list[NodeProcess]) -> None:
    while True:
        for node in nodes:
            if not node.running:
                node.start()
        await asyncio.sleep(0.1)
