"""2026-07-28 beside sessions: which era an exchange belongs to, and what holds for one without a session."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.mcpserver import Context, MCPServer
from starlette.requests import Request

from pgmcp.web.admission import Caller
from pgmcp.web.connection import Connection
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.modern import is_modern
from tests.cluster.test_identity import bearer, server
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything, tables_of
from tests.harness.modern import ACCEPT, VERSION, Modern, asked, wire
from tests.harness.proxy import proxied
from tests.harness.waiting import eventually

SUPPORTED, UNSUPPORTED = ["2026-07-28"], -32022
TOOLS_CHANGED = "notifications/tools/list_changed"
LISTEN = {"notifications": {"toolsListChanged": True}}
ACKNOWLEDGED = "notifications/subscriptions/acknowledged"


@pytest.mark.parametrize(
    ("named", "modern"),
    [
        ([], False),
        ([""], False),
        ([" \t"], False),
        (["2024-11-05"], False),
        (["2025-11-25"], False),
        ([" 2025-11-25 "], False),
        (["2026-07-28"], True),
        (["2026-07-28 "], True),
        (["2024-13-32"], True),
        (["\xe9'\""], True),
        (["2025-11-25", "2026-07-28"], False),
    ],
)
def test_one_rule_says_the_era(named: list[str], modern: bool) -> None:
    headers = [(b"mcp-session-id", b"x"), *((b"mcp-protocol-version", value.encode("latin-1")) for value in named)]
    assert is_modern({"type": "http", "headers": headers}) is modern


async def test_any_node_answers_and_nothing_is_stored(database: str) -> None:
    async with cluster(database, everything, 2) as nodes, tables_of(database) as tables, Modern() as client:
        before = await tables.counts()
        found = [(await client.call(node.url, "server/discover"))["result"] for node in nodes]
        assert found[0] == found[1]
        assert found[0]["supportedVersions"] == SUPPORTED
        for node in nodes:
            exchange = await client.tool(node.url, "test_tool_with_progress")
            assert (exchange.status, exchange.headers.get("mcp-session-id")) == (200, None)
            answer = await exchange.response(json.loads(exchange.request_body)["id"])
            assert answer["result"]["resultType"] == "complete"
            told = [message["params"]["progress"] for message in exchange.messages if "method" in message]
            assert told == [0, 50, 100]
            note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
            headers = {"accept": ACCEPT, "content-type": "application/json", "mcp-protocol-version": VERSION}
            assert (await client.send("POST", node.url, headers, json.dumps(note).encode())).status == 202
        assert await tables.counts() == before


async def test_a_session_id_means_nothing_and_other_verbs_are_not_there(database: str) -> None:
    async with cluster(database, everything, 1) as [node], RawSession() as session, Modern() as client:
        await session.open(node.url)
        await session.call_tool(node.url, "count")
        foreign = {"mcp-session-id": str(session.session_id), "last-event-id": "x"}
        answered = await client.request(node.url, "tools/call", {"name": "count", "arguments": {}}, headers=foreign)
        assert answered.status == 200
        assert "mcp-session-id" not in answered.headers
        for verb in ("GET", "DELETE"):
            headers = {"accept": "text/event-stream", "mcp-protocol-version": VERSION, **foreign}
            refused = await client.send(verb, node.url, headers)
            assert (refused.status, refused.headers["allow"]) == (405, "POST")
        assert (await session.call(node.url, "ping"))["result"] == {}


async def test_a_revision_that_is_not_served_is_told_which_are(database: str) -> None:
    async with cluster(database, everything, 1) as [node], Modern() as client:
        for version in ("2027-01-01", "2024-13-32", "\xe9'\""):
            headers, body = asked("server/discover", version=version)
            sent = {"accept": ACCEPT, "content-type": "application/json", **headers}
            encoded: Any = {name: value.encode("latin-1") for name, value in sent.items()}
            refused = await client.send("POST", node.url, encoded, json.dumps(body).encode())
            error = refused.json()["error"]
            assert (refused.status, error["code"]) == (400, UNSUPPORTED)
            assert error["data"]["supported"] == SUPPORTED


@contextlib.asynccontextmanager
async def connected(base: str, first: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """A connection on which something was sent."""
    at = urlsplit(base)
    reader, writer = await asyncio.open_connection(at.hostname, at.port, limit=1000)
    writer.write(first)
    try:
        yield reader
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_blanks_around_header_values_do_not_count(database: str) -> None:
    async with cluster(database, everything, 1) as [node]:
        head, body = wire(node.url, "tools/call", {"name": "test_simple_text", "arguments": {}}, pad=" \t ")
        async with connected(node.url, head + body) as reader:
            assert await asyncio.wait_for(reader.readline(), 10) == b"HTTP/1.1 200 OK\r\n"
            assert b"This is a simple text" in await asyncio.wait_for(reader.readuntil(b"testing."), 10)


async def test_host_origin_and_body_are_checked_as_for_sessions(database: str) -> None:
    async with cluster(database, everything, 1, max_body=5000, read_timeout=0.3) as [node], Modern() as client:
        ask = ("server/discover", None)
        assert (await client.request(node.url, *ask, headers={"host": "evil.example"})).status == 421
        assert (await client.request(node.url, *ask, headers={"origin": "http://evil.example"})).status == 403
        assert (await client.request(node.url, *ask, headers={"content-type": "text/plain"})).status == 400
        large = await client.tool(node.url, "test_x_mcp_header", region="x" * 5000)
        assert (large.status, large.json()["error"]["code"]) == (413, -32600)

        head, _ = wire(node.url, *ask)
        async with connected(node.url, head + b"{") as reader:
            assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 408")


async def test_the_servers_own_authentication_holds(database: str) -> None:
    async with cluster(database, server, 2) as nodes, Modern() as stranger, Modern(bearer("bob", number=7)) as bob:
        for node in nodes:
            refused = await stranger.request(node.url, "tools/call", {"name": "who", "arguments": {}})
            assert refused.status == 401
            assert "www-authenticate" in refused.headers
            seen = json.loads((await bob.result(node.url, "who"))["content"][0]["text"])
            assert (seen["token"]["subject"], seen["type"], seen["token"]["levels"]) == ("bob", "Badge", {"a": 3})


@pytest.mark.parametrize("response", ["sse", "json", "auto"])
@pytest.mark.parametrize("steps", [1, 1000], ids=["silent", "progress"])
async def test_a_client_that_goes_cancels_what_it_asked_for(database: str, response: str, steps: int) -> None:
    async with cluster(database, everything, 1, response=response) as [node], Modern() as client:

        async def running() -> int:
            return int((await client.result(node.url, "slow_calls_running"))["structuredContent"]["result"])

        going = asyncio.create_task(client.tool(node.url, "slow", seconds=60, steps=steps))
        await eventually(running, "the call runs")
        if response != "json" and steps > 1:
            await (await going).close()
        else:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)

        async def stopped() -> bool:
            return await running() == 0

        await eventually(stopped, "the call has stopped")
        assert node.modern.busy == 0


async def test_plain_json_where_the_node_is_told_to(database: str) -> None:
    async with cluster(database, everything, 1, response="json") as [node], Modern() as client:
        exchange = await client.request(
            node.url, "tools/call", {"name": "test_tool_with_progress", "arguments": {}},
            headers={"accept": "application/json"},
        )  # fmt: skip
        assert exchange.status == 200
        assert exchange.json()["result"]["content"]


def lonely(entered: Counter[str]) -> Any:
    """A server that counts how often it was started, and says what its lifespan gave."""

    @contextlib.asynccontextmanager
    async def lifespan(_: MCPServer[Any]) -> AsyncIterator[dict[str, int]]:
        entered["started"] += 1
        try:
            yield {"number": entered["started"]}
        finally:
            entered["stopped"] += 1

    made = MCPServer("lonely", lifespan=lifespan)

    @made.tool()
    def given(ctx: Context) -> int:
        return int(ctx.request_context.lifespan_context["number"])

    return made


async def test_both_eras_share_one_lifespan(database: str) -> None:
    entered: Counter[str] = Counter()
    async with cluster(database, lambda: lonely(entered), 1) as [node], RawSession() as session, Modern() as client:
        await session.open(node.url)
        assert (await session.call_tool(node.url, "given"))["structuredContent"] == {"result": 1}
        assert (await client.result(node.url, "given"))["structuredContent"] == {"result": 1}
        assert entered == {"started": 1}
    assert entered == {"started": 1, "stopped": 1}


async def test_it_is_served_while_the_database_is_away_and_after_the_node_was_fenced(database: str) -> None:
    short: dict[str, Any] = {"renew": 0.1, "deadline": 0.1, "trust": 0.5, "ttl": 1.0, "hold": 0.3}
    async with (
        proxied(database) as (proxy, way),
        cluster(way, everything, 1, **short) as [node],
        RawSession() as session,
        Modern() as client,
    ):
        await session.open(node.url)
        proxy.refusing = True
        proxy.cut_all()
        await eventually(lambda: not node.incarnation.lease.trusted, "the node has no trust")
        assert (await session.request(node.url, "ping")).status == 503
        for _ in range(3):
            assert await client.result(node.url, "test_simple_text")
        node.incarnation.over.set()
        await eventually(lambda: node.present is None, "the node is not part of the cluster", 20)
        assert await client.result(node.url, "test_simple_text")
        proxy.refusing = False
        await eventually(lambda: node.present is not None, "the node joins again")
        assert await client.result(node.url, "test_simple_text")


async def test_as_many_as_a_node_may_have_and_no_more(database: str) -> None:
    async with cluster(database, everything, 1, max_exchanges=2) as [node], Modern() as client:
        callers = [{"x-forwarded-for": f"10.0.0.{number}"} for number in range(2)]
        slow = {"name": "slow", "arguments": {"seconds": 60, "steps": 6000}}
        open_ones = [await client.request(node.url, "tools/call", slow, headers=caller) for caller in callers]
        refused = await client.request(node.url, "server/discover")
        assert (refused.status, refused.json()["error"]["code"]) == (503, -32603)
        assert refused.headers["retry-after"]
        await open_ones[0].close()

        async def again() -> bool:
            return (await client.request(node.url, "server/discover")).status == 200

        await eventually(again, "there is room again")


async def test_a_client_that_does_not_read_is_let_go(database: str) -> None:
    made = MCPServer("loud")

    @made.tool()
    async def shout(ctx: Context) -> str:
        for number in range(100_000):
            await ctx.report_progress(number, message="x" * 100_000)
        return "done"

    async with cluster(database, lambda: made, 1, write_timeout=0.3) as [node]:
        first = b"".join(wire(node.url, "tools/call", {"name": "shout", "arguments": {}}))
        async with connected(node.url, first) as reader:
            await eventually(lambda: node.modern.busy == 1, "the call runs")
            await eventually(lambda: node.modern.busy == 0, "the call has ended")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def silent(*_: object) -> Any:
    """What an exchange that does not speak is given to speak with."""
    raise AssertionError


def test_each_caller_has_a_line_and_so_has_each_address_where_nobody_is_known() -> None:
    def line(address: str | None, who: str = "") -> Caller:
        scope: dict[str, Any] = {"type": "http", "headers": [], "client": address and (address, 1)}
        if who:
            token = AccessToken(token="t", client_id="c", scopes=[], subject=who)
            scope["user"] = AuthenticatedUser(token)
        return HttpExchange(Request(scope), Connection(silent, silent, 1)).caller

    assert line("10.0.0.1") == line("10.0.0.1") != line("10.0.0.2")
    assert line("10.0.0.1", "ada") == line("10.0.0.2", "ada") != line("10.0.0.1", "bob")
    assert line(None) != line("10.0.0.1") != line("10.0.0.1", "ada")
    assert line("2001:db8::1") == line("[2001:db8::ffff]:443") != line("2001:db8:0:1::1")  # a client has a /64
    assert line("10.0.0.1") == line("10.0.0.1:5000") == line("::ffff:10.0.0.1")
    assert line("junk" * 1000) == line("junk" * 2000)


# leaving


async def test_a_drain_finishes_calls_serves_new_ones_meanwhile_and_ends_listen_streams_with_their_result(
    database: str,
) -> None:
    async with cluster(database, everything, 1, drain_notice=0.5) as [node], Modern() as client:
        stream = await client.request(node.url, "subscriptions/listen", LISTEN)
        await stream.message(ACKNOWLEDGED)
        call = await client.tool(node.url, "slow", seconds=1.5, steps=15)
        await call.message("notifications/progress")
        leaving = asyncio.create_task(node.node.drain())
        await eventually(lambda: node.node.unready() == "draining", "the node drains")
        assert await client.result(node.url, "test_trigger_tool_change")
        await stream.message(TOOLS_CHANGED)  # in the notice phase all goes on
        rpc_id = json.loads(stream.request_body)["id"]
        ended = await stream.response(rpc_id)
        assert ended["result"]["_meta"]["io.modelcontextprotocol/subscriptionId"] == rpc_id
        await stream.rest()
        assert stream.error is None, "ended with the final chunk"
        assert not leaving.done()
        answer = await call.response(json.loads(call.request_body)["id"])
        assert answer["result"]["content"][0]["text"] == "15 steps in 1.5 s"
        await asyncio.wait_for(leaving, 10)


async def test_a_node_that_has_to_leave_at_once_cuts_calls_and_ends_streams(database: str) -> None:
    async with cluster(database, everything, 1) as [node], Modern() as client:
        stream = await client.request(node.url, "subscriptions/listen", LISTEN)
        await stream.message(ACKNOWLEDGED)
        seen = await client.tool(node.url, "slow", seconds=60, steps=600)
        await seen.message("notifications/progress")
        silent = asyncio.create_task(client.tool(node.url, "slow", seconds=60, steps=1))
        await eventually(lambda: node.modern.busy == 2, "both run")
        node.node.stop_streams()
        assert (await stream.response(json.loads(stream.request_body)["id"]))["result"]
        await seen.rest()
        assert (seen.error, [message for message in seen.messages if "id" in message]) == (None, [])
        assert (await silent).status == 503


async def test_a_node_that_is_not_in_the_cluster_finishes_its_calls_when_it_leaves(database: str) -> None:
    async with cluster(database, everything, 1, drain_notice=0) as [node], Modern() as client:
        call = await client.tool(node.url, "slow", seconds=0.5, steps=5)
        await call.message("notifications/progress")
        here, node.node.supervisor.present = node.node.supervisor.present, None
        await asyncio.wait_for(node.node.drain(), 10)
        assert node.modern.busy == 0
        assert (await call.response(json.loads(call.request_body)["id"]))["result"]
        node.node.supervisor.present = here
