"""The owner is killed (SIGKILL) while many clients wait; they use other nodes and notice no more than a pause."""

from __future__ import annotations

import signal

import pytest

from tests.chaos.figures import ROUNDS, took
from tests.chaos.stage import Case, Stage, play, text_of
from tests.harness.clients import Message
from tests.harness.processes import NodeProcess
from tests.harness.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="package")

LONG, AGAIN = 60.0, 0.3
SERVED = "owner killed: its session is served again"
RERUN = f"owner killed: a safe call of {AGAIN} s is answered"
ERROR = "owner killed: an unsafe call ends with its error"
STEPS, STALL = 6, 3


async def idle(stage: Stage, owner: NodeProcess, edge: NodeProcess, *, subscribed: bool) -> Case:
    """Nothing is in flight. State, log level and subscription survive."""
    async with stage.session(owner, edge) as session:
        await session.call(edge.url, "logging/setLevel", {"level": "warning"})
        if subscribed:
            await session.call(edge.url, "resources/subscribe", {"uri": "chaos://watched"})
        before = await session.call_tool(edge.url, "count")
        known = {"level": "warning", "subscribed": subscribed}
        assert before["structuredContent"] == {"memory": 1, "kept": 1, "restored": False} | known
        yield
        after = await session.call_tool(edge.url, "count", 30)
        took(SERVED, stage.since(), most=2.5, p50=1.5)
        assert after["structuredContent"] == {"memory": 1, "kept": 2, "restored": True} | known
        if subscribed:
            async with await session.get(edge.url) as standalone:
                await session.call_tool(edge.url, "touch")
                updated = await standalone.message("notifications/resources/updated")
                assert updated["params"]["uri"] == "chaos://watched"


async def runs_again(stage: Stage, owner: NodeProcess, edge: NodeProcess, *, tool: str) -> Case:
    """It may run again: by its annotations, or because the operator says so."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, tool, text=text_of(tool), first=LONG, again=AGAIN)
        await stage.happened("start", call.text)
        yield
        text, pid = await call.result()
        took(RERUN, stage.since(), most=2.5 + AGAIN)
        assert text == call.text
        assert stage.truth("start", call.text) == [owner.pid, pid]
        assert stage.truth("end", call.text) == [pid]


async def unsafe(stage: Stage, owner: NodeProcess, edge: NodeProcess) -> Case:
    """It may have run, and must not again."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "unsafe", text=text_of("unsafe"), first=LONG)
        await stage.happened("start", call.text)
        yield
        answer = await call.answer()
        took(ERROR, stage.since(), most=3.0)
        assert answer["error"]["code"] == -32603
        assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
        assert stage.truth("start", call.text) == [owner.pid]
        assert (await session.call_tool(edge.url, "count"))["structuredContent"]["restored"] is True


async def waiting(stage: Stage, owner: NodeProcess, edge: NodeProcess) -> Case:
    """What came after the death was not claimed by anybody: it runs, safe or not."""
    async with stage.session(owner, edge) as session:
        yield
        call = await stage.call(session, edge, "unsafe", text=text_of("unsafe"))
        text, pid = await call.result()
        assert (text, stage.truth("start", call.text)) == (call.text, [pid])


async def progress(stage: Stage, owner: NodeProcess, edge: NodeProcess) -> Case:
    """A call that runs again reports no progress that its client has seen."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "steps", text=text_of("steps"), count=STEPS, seconds=0.05, stall=STALL)
        await stage.happened("stall", call.text)
        yield
        _, pid = await call.result()
        told = [message["params"] for message in call.messages if message.get("method") == "notifications/progress"]
        assert [params["progress"] for params in told] == list(range(1, STEPS + 1))
        by = [int(params["message"].split()[1]) for params in told]
        assert by == [owner.pid] * STALL + [pid] * (STEPS - STALL)


async def question(stage: Stage, owner: NodeProcess, edge: NodeProcess, *, answered: bool) -> Case:
    """The tool asks again, and an answer to the dead owner's question, early or late, is no answer to that."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "ask", text=text_of("ask"))
        lost = await call.method("elicitation/create")
        yield
        if answered:
            assert (await session.answer(edge.url, lost, {"action": "decline"})).status == 202
        asked = await call.method("elicitation/create")
        cancelled = [message["params"]["requestId"] for message in call.messages if _cancels(message)]
        assert cancelled == ([] if answered else [lost["id"]])
        assert asked["id"] != lost["id"]
        assert (await session.answer(edge.url, lost, {"action": "decline"})).status == 202
        yes = {"action": "accept", "content": {"ok": True}}
        assert (await session.answer(edge.url, asked, yes)).status == 202
        assert (await call.answer())["result"]["content"][0]["text"] == f"{call.text} accept"
        assert len(stage.truth("start", call.text)) == 2


def _cancels(message: Message) -> bool:
    return message.get("method") == "notifications/cancelled"


async def cancelled(stage: Stage, owner: NodeProcess, edge: NodeProcess) -> Case:
    """The client gives up while nobody owns its session."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "safe", text=text_of("safe"), first=LONG)
        await stage.happened("start", call.text)
        yield
        assert (await session.notify(edge.url, "notifications/cancelled", {"requestId": call.id})).status == 202
        answer = await call.answer()
        assert answer["error"]["code"] == -32800
        assert stage.truth("start", call.text) == [owner.pid]


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_the_owner_is_killed(stage: Stage, turn: int) -> None:
    owner, *edges = stage.nodes[turn % 4 :] + stage.nodes[: turn % 4]
    cases = [
        idle(stage, owner, edges[0], subscribed=False),
        idle(stage, owner, edges[1], subscribed=True),
        runs_again(stage, owner, edges[2], tool="safe"),
        runs_again(stage, owner, edges[0], tool="repeatable"),
        runs_again(stage, owner, edges[1], tool="named"),
        unsafe(stage, owner, edges[2]),
        unsafe(stage, owner, edges[0]),
        waiting(stage, owner, edges[1]),
        progress(stage, owner, edges[2]),
        question(stage, owner, edges[0], answered=False),
        question(stage, owner, edges[1], answered=True),
        cancelled(stage, owner, edges[2]),
    ]
    await play(cases, lambda: stage.kill(owner))


async def interrupted(stage: Stage, owner: NodeProcess, edge: NodeProcess, *, tool: str) -> Case:
    """The call outlasts the drain: its new owner runs it again or ends it; never the server that goes."""
    async with stage.session(owner, edge) as session:
        await session.call_tool(edge.url, "count")
        call = await stage.call(session, edge, tool, text=text_of(tool), first=3.0)
        await stage.happened("start", call.text)
        yield
        answer = await call.answer()
        if "result" not in answer:
            assert tool == "unsafe"
            assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
        counted = (await session.call_tool(edge.url, "count"))["structuredContent"]
        assert (counted["memory"], counted["kept"], counted["restored"]) == (2, 2, True), "what it exported moves too"


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_the_owner_leaves(stage: Stage, turn: int) -> None:
    """In an orderly way (SIGTERM), in the middle of calls."""
    owner, edge, *_ = stage.nodes[turn % 4 :] + stage.nodes[: turn % 4]
    cases = [interrupted(stage, owner, edge, tool=tool) for tool in ("safe", "unsafe", "named", "unsafe")]
    await play(cases, lambda: owner.signal(signal.SIGTERM))
    await eventually(lambda: not owner.running, "it has left")
