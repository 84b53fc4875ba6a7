"""Patience leaves no gap: what has a number is stored, whoever has given up; and a refusal is not a session's end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mcp.server.mcpserver import Context, MCPServer

from pgmcp.errors import DatabaseUnavailable
from pgmcp.session import event_appender
from pgmcp.session.running_requests import ActorEnd
from pgmcp.store.encryption.key_rings import KeyRing
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, cluster
from tests.harness.proxy import Proxy, proxied
from tests.harness.waiting import eventually

PROGRESS = "notifications/progress"
CALL = "the call"
SHORT = 0.2
"""Seconds after which a tool gives its own report up."""


class Reporter:
    """A server whose tool reports under a timeout of its own, and ends when the test lets it."""

    def __init__(self) -> None:
        self.runs = self.given_up = 0
        self.report, self.end = asyncio.Event(), asyncio.Event()

    def server(self) -> MCPServer:
        server = MCPServer("reporter")

        @server.tool(structured_output=False)
        async def work(ctx: Context, reports: int) -> str:
            """Report some times, then end."""
            self.runs += 1
            await ctx.report_progress(0, None)
            await self.report.wait()
            for step in range(1, reports + 1):
                try:
                    async with asyncio.timeout(SHORT):
                        await ctx.report_progress(step, None)
                except TimeoutError:
                    self.given_up += 1
            await self.end.wait()
            return "done"

        @server.tool(structured_output=False)
        async def quick() -> str:
            """End at once."""
            return "quick"

        return server


class Scene:
    """A node behind a proxy, and a session with a running call."""

    def __init__(self, proxy: Proxy, node: RunningNode, session: RawSession, reporter: Reporter) -> None:
        self.proxy, self.node, self.session, self.reporter = proxy, node, session, reporter

    async def working(self, reports: int) -> Any:
        params = {"name": "work", "arguments": {"reports": reports}, "_meta": {"progressToken": 7}}
        call = await self.session.request(self.node.url, "tools/call", params, request_id=CALL)
        await call.message(PROGRESS)
        return call

    def away(self) -> None:
        self.proxy.refusing = True
        self.proxy.cut_all()


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    reporter = Reporter()
    async with contextlib.AsyncExitStack() as stack:
        proxy, through = await stack.enter_async_context(proxied(database))
        # writes used to lose patience after resume_hold
        nodes = await stack.enter_async_context(
            cluster(through, reporter.server, 1, hold=0.5, resume_hold=1.0, poll=0.5)
        )
        session = await stack.enter_async_context(RawSession())
        await session.open(nodes[0].url)
        yield Scene(proxy, nodes[0], session, reporter)


@pytest.mark.parametrize("reports", [1, 2], ids=["one event waits", "two events wait"])
async def test_an_event_whose_sayer_gave_up_leaves_no_gap(scene: Scene, reports: int) -> None:
    """A tool gives its reports up while PostgreSQL is away for longer than a write is waited for, and ends."""
    call = await scene.working(reports)
    scene.away()
    scene.reporter.report.set()
    await eventually(lambda: scene.reporter.given_up == reports, "the tool gave its reports up")
    await asyncio.sleep(1.3)  # the length of the outage is what is tested
    scene.reporter.end.set()
    await asyncio.sleep(0.1)
    scene.proxy.refusing = False
    answer = await call.response(CALL)
    assert answer["result"]["content"][0]["text"] == "done"
    told = [message["params"]["progress"] for message in call.messages if message.get("method") == PROGRESS]
    assert told == list(range(reports + 1))
    assert scene.reporter.runs == 1


async def test_what_has_no_number_may_be_given_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound of what may wait a sayer waits before his event has a number; the answer does not wait."""
    monkeypatch.setattr(event_appender, "EVENTS", 1)
    call = await scene.working(3)
    scene.away()
    scene.reporter.report.set()
    await eventually(lambda: scene.reporter.given_up == 3, "the tool gave its reports up")
    scene.reporter.end.set()
    await asyncio.sleep(0.1)
    scene.proxy.refusing = False
    answer = await call.response(CALL)
    assert answer["result"]["content"][0]["text"] == "done"
    told = [message["params"]["progress"] for message in call.messages if message.get("method") == PROGRESS]
    assert told == [0, 1]


async def test_a_session_that_lost_step_is_restored_and_not_ended(scene: Scene) -> None:
    """Somebody moved a stream's number: its call ends with an error, the session goes on, and its other calls too."""
    call = await scene.working(0)
    host = scene.node.incarnation.host
    [first] = host.actors.values()
    for stream in first.outbox.streams.values():
        stream.next_seq += 1
    scene.reporter.report.set()
    scene.reporter.end.set()
    answer = await call.response(CALL)
    assert answer["error"]["data"]["reason"] == "owner_lost"
    other = await scene.session.call_tool(scene.node.url, "quick")
    assert other["content"][0]["text"] == "quick"
    assert host.actors[first.ownership.session] is not first
    assert scene.reporter.runs == 1


async def test_an_actor_that_was_replaced_ends_nobody(scene: Scene) -> None:
    """Its server session may end at any time after another one has its place."""
    host = scene.node.incarnation.host
    [former] = host.actors.values()
    former.mute()
    host.over(former, ActorEnd.OUT_OF_STEP)

    def replaced() -> bool:
        return any(host.actors[session] is not former for session in host.movable(busy=True))

    await eventually(replaced, "another one has its place")
    host.over(former, ActorEnd.ENDED)
    assert (await scene.session.call_tool(scene.node.url, "quick"))["content"][0]["text"] == "quick"


async def test_a_key_that_cannot_be_read_now_is_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was acknowledged is neither rejected nor dropped, and keeps its place."""
    tries, opening = 0, KeyRing.open

    async def unavailable(ring: KeyRing, sealed: bytes, place: bytes) -> bytes:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise DatabaseUnavailable("PostgreSQL does not answer.")
        return await opening(ring, sealed, place)

    monkeypatch.setattr(KeyRing, "open", unavailable)
    assert (await scene.session.call_tool(scene.node.url, "quick"))["content"][0]["text"] == "quick"
    assert tries >= 3
