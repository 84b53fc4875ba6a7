"""How a POST is answered: as server-sent events, as plain JSON, or as whatever fits; and what keeps streams alive."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import SamplingMessage, TextContent
from pydantic import BaseModel

from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import cluster, everything
from tests.harness.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning")

edges = pytest.mark.parametrize("edge", [0, 1])
CAN: dict[str, Any] = {"elicitation": {"form": {}}, "sampling": {}, "roots": {}}


class Asking:
    """A server whose tools ask the client, or work until the test lets them go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.working = 0

    def server(self) -> MCPServer:
        server = MCPServer("asking")

        class Form(BaseModel):
            name: str

        @server.tool()
        async def elicit(ctx: Context) -> str:
            return (await ctx.elicit("Who?", Form)).action

        @server.tool()
        async def sample(ctx: Context) -> str:
            question = SamplingMessage(role="user", content=TextContent(text="?"))
            answer = await ctx.session.create_message([question], max_tokens=1, related_request_id=ctx.request_id)
            return str(answer.model)

        @server.tool()
        async def progress(ctx: Context) -> str:
            await ctx.report_progress(1, 2)
            await ctx.report_progress(2, 2)
            return "done"

        @server.tool()
        async def work(ctx: Context) -> str:
            self.working += 1
            await self.go.wait()
            return "done"

        return server


def tool(name: str, **meta: object) -> dict[str, Any]:
    return {"name": name, "arguments": {}} | ({"_meta": meta} if meta else {})


@edges
async def test_json(database: str, edge: int) -> None:
    asking = Asking()
    async with cluster(database, asking.server, 2, response="json") as nodes, RawSession(capabilities=CAN) as session:
        opened = await session.initialize(nodes[0].url)
        assert opened.headers["content-type"] == "application/json"
        assert opened.headers["mcp-session-id"] == session.session_id
        assert opened.json()["result"]["protocolVersion"] == "2025-11-25"
        await session.notify(nodes[edge].url, "notifications/initialized")
        exchange = await session.request(
            nodes[edge].url, "tools/call", tool("progress", progressToken="p"), request_id=3
        )
        assert exchange.headers["content-type"] == "application/json"
        assert exchange.headers["mcp-session-id"] == session.session_id
        assert exchange.json()["id"] == 3
        assert exchange.json()["result"]["content"][0]["text"] == "done"
        for name in ("elicit", "sample"):
            answer = await session.call(nodes[edge].url, "tools/call", tool(name), timeout=5)
            assert "error" in answer or answer["result"]["isError"], answer
        # without a taste for events
        only_json = await session.post(
            nodes[edge].url, {"jsonrpc": "2.0", "id": 4, "method": "ping"}, headers={"accept": "application/json"}
        )
        assert only_json.json() == {"jsonrpc": "2.0", "id": 4, "result": {}}
        # a slow one waits for its answer
        slow = asyncio.create_task(session.call(nodes[edge].url, "tools/call", tool("work")))
        await eventually(lambda: asking.working == 1, "the tool works")
        asking.go.set()
        assert (await slow)["result"]["content"][0]["text"] == "done"


@edges
async def test_json_that_was_cancelled_or_ended(database: str, edge: int) -> None:
    asking = Asking()
    async with cluster(database, asking.server, 2, response="json") as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        slow = asyncio.create_task(session.request(nodes[edge].url, "tools/call", tool("work"), request_id=7))
        await eventually(lambda: asking.working == 1, "the tool works")
        await session.notify(nodes[1 - edge].url, "notifications/cancelled", {"requestId": 7})
        assert (await slow).json()["error"]["code"] == -32800
        slow = asyncio.create_task(session.request(nodes[edge].url, "tools/call", tool("work"), request_id=8))
        await eventually(lambda: asking.working == 2, "the tool works")
        assert (await session.delete(nodes[1 - edge].url)).status == 200
        ended = await asyncio.wait_for(slow, 5)
        assert ended.status >= 400
        assert "error" in ended.json()


@edges
async def test_auto(database: str, edge: int) -> None:
    asking = Asking()
    async with cluster(database, asking.server, 2, response="auto") as nodes, RawSession(capabilities=CAN) as session:
        opened = await session.initialize(nodes[0].url)
        assert opened.headers["content-type"] == "application/json"
        await session.notify(nodes[0].url, "notifications/initialized")
        kinds = set()
        for _ in range(10):
            quick = await session.request(nodes[edge].url, "ping", request_id=1)
            kinds.add(quick.headers["content-type"])
            assert (await quick.response(1))["result"] == {}
            if quick.is_stream:
                await quick.rest()
        assert "application/json" in kinds
        # what is more than an answer is a stream, and so is what takes long
        talking = await session.request(
            nodes[edge].url, "tools/call", tool("progress", progressToken="p"), request_id=3
        )
        events = await talking.rest()
        assert talking.headers["content-type"] == "text/event-stream"
        assert [message.get("method") for message in talking.messages] == ["notifications/progress"] * 2 + [None]
        assert events[0].is_priming
        ids = [event.id for event in events]
        assert len(set(ids)) == len(ids)
        assert [int(str(event_id).rpartition(".")[2]) for event_id in ids] == [0, 1, 2, 3]
        slow = await session.request(nodes[edge].url, "tools/call", tool("work"), request_id=4)
        assert slow.headers["content-type"] == "text/event-stream"
        asking.go.set()
        assert "result" in await slow.response(4)
        asked = await session.request(nodes[edge].url, "tools/call", tool("elicit"), request_id=5)
        question = await asked.message("elicitation/create")
        await session.answer(nodes[1 - edge].url, question, {"action": "decline"})
        assert (await asked.response(5))["result"]["content"][0]["text"] == "decline"


@pytest.mark.parametrize(
    ("version", "primed"), [("2025-03-26", False), ("2025-06-18", False), ("2025-11-25", True)]
)  # fmt: skip
async def test_only_the_newest_revision_is_primed(database: str, version: str, primed: bool) -> None:
    async with (
        cluster(database, everything, 2, retry_ms=1234) as nodes,
        RawSession(protocol_version=version) as session,
    ):
        opened = await session.initialize(nodes[0].url)
        first = await opened.rest()
        await session.notify(nodes[1].url, "notifications/initialized")
        exchange = await session.request(nodes[1].url, "ping")
        second = await exchange.rest()
        standalone = await session.get(nodes[1].url)
        for events in (first, second):
            ids = [event.id for event in events if event.id]
            assert len(set(ids)) == len(ids), "event ids are unique"
            assert [event.is_priming for event in events] == [True, False][not primed :]
            assert [event.retry for event in events] == [1234, None][not primed :]
        if primed:
            assert (await standalone.event()).retry == 1234
        assert (await session.delete(nodes[0].url)).status == 200
        rest = await standalone.rest()
        assert all(event.retry == 1234 for event in rest)
        assert bool(rest) == primed


async def test_the_answer_to_initialize_can_be_resumed(database: str) -> None:
    """Also the first stream's priming event stands before its first message."""
    async with cluster(database, everything, 2) as nodes, RawSession() as session:
        opened = await session.initialize(nodes[0].url)
        priming = await opened.event()
        assert priming.is_priming
        await opened.close()
        resumed = await session.get(nodes[1].url, priming.id)
        assert resumed.status == 200
        assert (await resumed.response(0))["result"]["protocolVersion"] == "2025-11-25"


@pytest.mark.parametrize("version", ["2025-03-26", "2025-11-25"])
@edges
async def test_comments_keep_silent_streams_open(database: str, version: str, edge: int) -> None:
    asking = Asking()
    async with (
        cluster(database, asking.server, 2, keepalive=0.1) as nodes,
        RawSession(protocol_version=version) as session,
    ):
        await session.open(nodes[0].url)
        standalone = await session.get(nodes[edge].url)
        exchange = await session.request(nodes[edge].url, "tools/call", tool("work"), request_id=1)
        for stream in (standalone, exchange):

            def commented(stream: RawExchange = stream) -> bool:
                return stream.comments >= 3

            await eventually(commented, "comments come")
        asking.go.set()
        assert "result" in await exchange.response(1)


async def test_a_busy_stream_has_no_comments(database: str) -> None:
    async with cluster(database, everything, 2, keepalive=2.0) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        slow = {"name": "slow", "arguments": {"seconds": 0.5, "steps": 20}, "_meta": {"progressToken": 1}}
        exchange = await session.request(nodes[1].url, "tools/call", slow)
        await exchange.rest()
        assert len(exchange.messages) == 21
        assert exchange.comments == 0


async def test_an_odd_version_in_initialize(database: str, subtests: pytest.Subtests) -> None:
    """The server answers with a version that it speaks, or refuses; either way every node agrees on it."""
    async with cluster(database, everything, 2) as nodes:
        for asked in ("2024-11-05", "2099-01-01", "x", "", None, 7, ["2025-11-25"]):
            with subtests.test(str(asked)):
                async with RawSession(protocol_version="") as session:  # no header
                    await _open_with(session, [node.url for node in nodes], asked)


async def _open_with(session: RawSession, urls: list[str], asked: object) -> None:
    params = {"protocolVersion": asked, "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
    exchange = await session.post(urls[0], {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
    if not isinstance(asked, str):
        assert exchange.status == 400
        assert exchange.json()["error"]["code"] == -32602
        return
    assert exchange.status == 200
    session.session_id = exchange.headers["mcp-session-id"]
    chosen = (await exchange.response(0))["result"]["protocolVersion"]
    assert chosen == (asked if asked == "2024-11-05" else "2025-11-25")
    assert (await session.notify(urls[1], "notifications/initialized")).status == 202
    later = await session.request(urls[1], "ping")
    assert (await later.rest())[0].is_priming == (chosen >= "2025-11-25")
