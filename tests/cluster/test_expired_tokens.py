"""A token that expires ends what it has opened, and no call: its client goes on with another one of its principal."""

from __future__ import annotations

import asyncio
import time

import pytest
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer

from pgmcp.clock import Clock
from pgmcp.web.token_expiry import GRACE_SECONDS
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import cluster, tables_of
from tests.harness.modern import Modern
from tests.harness.waiting import eventually

EXPIRES = int(time.time()) + 3600
LEFT = 0.5
"""Seconds from when an exchange comes until its token has expired and the grace is over: the date stands still."""

SHORT = {"authorization": "Bearer ada/expires"}
FRESH = {"authorization": "Bearer ada"}
HOLD = {"name": "hold", "arguments": {}}
edges = pytest.mark.parametrize("edge", [0, 1])


class StandingDate(Clock):
    def wall(self) -> float:
        return EXPIRES + GRACE_SECONDS - LEFT


class Verifier:
    async def verify_token(self, token: str) -> AccessToken:
        who, _, expires = token.partition("/")
        return AccessToken(
            token=token, client_id="client", scopes=[], subject=who, expires_at=EXPIRES if expires else None
        )


class Holder:
    """Makes servers whose tool runs until it is released."""

    def __init__(self) -> None:
        self.release, self.runs, self.running = asyncio.Event(), 0, 0

    def __call__(self) -> MCPServer:
        auth = AuthSettings.model_validate(
            {"issuer_url": "https://i", "resource_server_url": None, "validate_token_resource": False}
        )
        server = MCPServer("holder", token_verifier=Verifier(), auth=auth)
        server.tool()(self.hold)
        server.tool()(self.talk)
        return server

    async def hold(self) -> str:
        self.runs, self.running = self.runs + 1, self.running + 1
        try:
            await self.release.wait()
        finally:
            self.running -= 1
        return "held"

    async def talk(self, ctx: Context) -> str:
        """Say something, all the time."""
        number = 0
        while not self.release.is_set():
            number += 1
            await ctx.report_progress(number)
            await asyncio.sleep(0.01)
        return "talked"


@pytest.fixture
def holder() -> Holder:
    return Holder()


async def ended(exchange: RawExchange) -> None:
    """It ends in order, without an answer, and says when to come back."""
    await exchange.rest()
    assert exchange.error is None
    assert exchange.seen[-1].retry == 1000
    assert not any("result" in message for message in exchange.messages)


@edges
@pytest.mark.parametrize("tool", ["hold", "talk"])
async def test_a_calls_stream_ends_and_its_call_goes_on(database: str, holder: Holder, edge: int, tool: str) -> None:
    async with (
        cluster(database, holder, 2, clock=StandingDate) as nodes,
        RawSession(headers=FRESH) as session,
        RawSession(headers={"authorization": "Bearer eve"}) as eve,
    ):
        await session.open(nodes[0].url)
        call = {"name": tool, "arguments": {}, "_meta": {"progressToken": 1}}
        message = {"jsonrpc": "2.0", "id": "c", "method": "tools/call", "params": call}
        exchange = await session.post(nodes[edge].url, message, headers=SHORT)
        assert exchange.status == 200
        await ended(exchange)
        eve.session_id = session.session_id
        assert (await eve.get(nodes[edge].url, exchange.last_event_id)).status == 404
        resumed = await session.get(nodes[1 - edge].url, exchange.last_event_id)
        holder.release.set()
        answer = await resumed.response("c")
        assert answer["result"]["content"][0]["text"] in {"held", "talked"}
        said = [m["params"]["progress"] for m in exchange.messages + resumed.messages if "params" in m]
        assert said == list(range(1, len(said) + 1))  # all of it, once


@edges
async def test_a_standalone_stream_ends_and_what_comes_waits(database: str, holder: Holder, edge: int) -> None:
    async with (
        cluster(database, holder, 2, clock=StandingDate) as nodes,
        tables_of(database) as tables,
        RawSession(headers=FRESH) as session,
    ):
        await session.open(nodes[0].url)
        stream = await session.get(nodes[edge].url, headers=SHORT)
        await ended(stream)
        free = "select count(*) = 0 from pgmcp.streams where sink is not null"
        await eventually(lambda: tables.value(free), "nobody carries it")
        resumed = await session.get(nodes[1 - edge].url, stream.last_event_id)
        await resumed.next()
        with pytest.raises(TimeoutError):
            await resumed.next(2 * LEFT)  # this one's token does not expire


@edges
async def test_plain_json_is_401_and_the_same_request_gets_the_answer(database: str, holder: Holder, edge: int) -> None:
    async with (
        cluster(database, holder, 2, clock=StandingDate, response="json") as nodes,
        RawSession(headers=FRESH) as session,
    ):
        await session.open(nodes[0].url)
        message = {"jsonrpc": "2.0", "id": "c", "method": "tools/call", "params": HOLD}
        refused = await session.post(nodes[edge].url, message, headers=SHORT)
        assert refused.status == 401
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]
        assert holder.running == 1
        again = asyncio.create_task(session.post(nodes[1 - edge].url, message))
        holder.release.set()
        assert (await again).json()["result"]["content"][0]["text"] == "held"
        assert holder.runs == 1


@edges
async def test_an_http_sse_stream_ends_and_goes_on(database: str, holder: Holder, edge: int) -> None:
    async with (
        cluster(database, holder, 2, clock=StandingDate) as nodes,
        RawSession(headers=FRESH, path="/sse") as client,
    ):

        async def post(method: str, rpc_id: int | None, **params: object) -> None:
            async with RawSession(headers=FRESH, path=where) as poster:
                message = {"jsonrpc": "2.0", "method": method, "params": params}
                sent = await poster.post(nodes[edge].url, message if rpc_id is None else {**message, "id": rpc_id})
                assert sent.status == 202

        first = await client.get(nodes[0].url)
        where = str((await first.event()).data)
        info = {"name": "c", "version": "1"}
        await post("initialize", 0, protocolVersion="2024-11-05", capabilities={}, clientInfo=info)
        while first.last_event_id is None:
            await first.next()
        await post("notifications/initialized", None)
        await post("tools/call", 1, **HOLD)
        stream = await client.get(nodes[edge].url, first.last_event_id, headers=SHORT)
        assert (await stream.event()).data == where
        await stream.rest()
        assert (stream.error, stream.last_event_id) == (None, None)
        resumed = await client.get(nodes[1 - edge].url, first.last_event_id)
        assert (await resumed.event()).data == where
        holder.release.set()
        assert (await resumed.response(1))["result"]["content"][0]["text"] == "held"


async def test_without_a_session_it_is_cancelled_and_listening_ends(database: str, holder: Holder) -> None:
    async with cluster(database, holder, 1, clock=StandingDate) as [node], Modern(SHORT) as client:
        listening = await client.request(
            node.url, "subscriptions/listen", {"notifications": {"toolsListChanged": True}}
        )
        await listening.message("notifications/subscriptions/acknowledged")
        await listening.rest()
        assert listening.error is None
        refused = await client.tool(node.url, "hold")
        assert refused.status == 401
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]
        await eventually(lambda: holder.running == 0, "it was cancelled")
        talking = await client.tool(node.url, "talk")
        await talking.message("notifications/progress")
        await talking.rest()
        assert talking.error is None
        assert not any("result" in message for message in talking.messages)
        assert node.modern.open == 0
    async with cluster(database, holder, 1, clock=StandingDate) as [node], Modern(FRESH) as client:
        fresh = asyncio.create_task(client.result(node.url, "hold"))
        await eventually(lambda: holder.running == 1, "it runs")
        await asyncio.wait({fresh}, timeout=2 * LEFT)
        holder.release.set()
        assert (await fresh)["content"][0]["text"] == "held"
