"""The node that carries the streams is killed, alone or together with the owner; clients resume on another one."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import httpx
import pytest

from tests.chaos.figures import ROUNDS, took
from tests.chaos.stage import Call, Case, Stage, play, text_of
from tests.harness.clients import RawSession
from tests.harness.processes import NodeProcess

pytestmark = pytest.mark.asyncio(loop_scope="package")

LONG = 60.0
STEPS = 40
EDGE = "edge killed: the rest of a stream begins elsewhere"
BOTH = "owner (frozen a moment before) and edge killed: a safe call is answered"
LOST = "owner (frozen a moment before) and edge killed: an unsafe call ends with its error"


async def stream(stage: Stage, owner: NodeProcess, edge: NodeProcess, other: NodeProcess) -> Case:
    """The call goes on; its client gets the rest of the stream once."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "steps", text=text_of("unsafe"), count=STEPS, seconds=0.03, stall=0)
        await call.method("notifications/progress")
        yield
        await call.resume(other)
        await call.next()
        took(EDGE, stage.since())
        assert await call.result() == (call.text, owner.pid)
        told = [message["params"]["progress"] for message in call.messages if "method" in message]
        assert told == list(range(1, STEPS + 1))


async def standalone(stage: Stage, owner: NodeProcess, edge: NodeProcess, other: NodeProcess) -> Case:
    """What is said while nobody listens waits for the client."""
    async with stage.session(owner, edge) as session:
        await session.call(edge.url, "resources/subscribe", {"uri": "chaos://watched"})
        listening = await session.get(edge.url)
        await session.call_tool(edge.url, "touch")
        await listening.message("notifications/resources/updated")
        yield
        assert (await session.call_tool(other.url, "touch"))["content"][0]["text"] == "touched"
        async with await session.get(other.url, listening.last_event_id) as again:
            assert await again.message("notifications/resources/updated")
            with pytest.raises(TimeoutError):
                await again.message("notifications/resources/updated", timeout=0.2)


async def question(stage: Stage, owner: NodeProcess, edge: NodeProcess, other: NodeProcess) -> Case:
    """The owner lives, so its question stands."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "ask", text=text_of("ask"))
        asked = await call.method("elicitation/create")
        yield
        yes = {"action": "accept", "content": {"ok": True}}
        assert (await session.answer(other.url, asked, yes)).status == 202
        await call.resume(other)
        assert (await call.answer())["result"]["content"][0]["text"] == f"{call.text} accept"
        assert stage.truth("start", call.text) == [owner.pid]


async def doubt(stage: Stage, owner: NodeProcess, edge: NodeProcess, other: NodeProcess) -> Case:
    """The client cannot know whether its POST arrived, and sends it again; it runs once all the same."""
    async with stage.session(owner, edge) as session:
        call = Call(stage, session, "unsafe", {"text": text_of("unsafe")})
        yield
        posting = asyncio.create_task(call.post(edge))
        await asyncio.sleep(random.uniform(0, 0.02))
        yield
        with suppress(httpx.HTTPError):
            await posting
            while await call.next() is not None:
                pass
        if not call.messages:
            await call.post(other)
        assert await call.result() == (call.text, owner.pid)
        assert stage.truth("start", call.text) == [owner.pid]


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_the_edge_is_killed(stage: Stage, turn: int) -> None:
    edge, owner, other, another = stage.nodes[turn % 4 :] + stage.nodes[: turn % 4]
    cases = [
        stream(stage, owner, edge, owner),
        stream(stage, owner, edge, other),
        stream(stage, owner, edge, another),
        standalone(stage, owner, edge, other),
        question(stage, owner, edge, other),
    ]
    last = [doubt(stage, owner, edge, node) for node in (owner, other, another)]
    await play([*cases, *last], lambda: stage.kill(edge), last)


async def safe(stage: Stage, owner: NodeProcess, edge: NodeProcess, *, tool: str = "safe") -> Case:
    """The client resumes somewhere; the call runs again."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, tool, text=text_of(tool), first=LONG)
        await stage.happened("start", call.text)
        yield
        text, pid = await call.result()
        took(BOTH, stage.since(), most=3.0)
        assert (text, stage.truth("start", call.text)) == (call.text, [owner.pid, pid])


async def progress(stage: Stage, owner: NodeProcess, edge: NodeProcess) -> Case:
    """The events of both runs come once, and progress only grows."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "steps", text=text_of("steps"), count=6, seconds=0.03, stall=3)
        await call.method("notifications/progress")
        await stage.happened("stall", call.text)
        yield
        assert (await call.result())[0] == call.text
        told = [message["params"]["progress"] for message in call.messages if "method" in message]
        assert told == [1, 2, 3, 4, 5, 6]


async def unsafe(stage: Stage, owner: NodeProcess, edge: NodeProcess) -> Case:
    """The client resumes somewhere and finds the error."""
    async with stage.session(owner, edge) as session:
        call = await stage.call(session, edge, "unsafe", text=text_of("unsafe"), first=LONG)
        await stage.happened("start", call.text)
        yield
        answer = await call.answer()
        took(LOST, stage.since(), most=3.0)
        assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
        assert stage.truth("start", call.text) == [owner.pid]


async def waiting(stage: Stage, session: RawSession, owner: NodeProcess, edge: NodeProcess) -> Case:
    """Accepted while the owner could not claim it: it has not run, so it runs."""
    await stage.frozen(owner)
    call = await stage.call(session, edge, "unsafe", text=text_of("unsafe"))
    yield
    text, pid = await call.result()
    assert (text, stage.truth("start", call.text)) == (call.text, [pid])


@pytest.mark.parametrize("turn", range(ROUNDS))
async def test_owner_and_edge_are_killed_together(stage: Stage, turn: int) -> None:
    """In every other round with one more node, so that one alone takes everything."""
    owner, edge, third, _ = stage.nodes[turn % 4 :] + stage.nodes[: turn % 4]
    cases = [
        safe(stage, owner, edge),
        safe(stage, owner, edge, tool="named"),
        safe(stage, edge, owner),
        progress(stage, owner, edge),
        progress(stage, edge, owner),
        unsafe(stage, owner, edge),
        unsafe(stage, edge, owner),
    ]
    killed = [owner, edge, *([third] if turn % 2 else [])]
    async with stage.session(owner, edge) as one, stage.session(owner, edge) as two:
        last = [waiting(stage, session, owner, edge) for session in (one, two)]
        await play(cases, lambda: stage.kill(*killed), last)
