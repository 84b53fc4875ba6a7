"""HTTP+SSE (2024-11-05) in front of three nodes: the official Python client through balancers, and the wire by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from mcp import ClientSession, types
from mcp.client.session import ClientRequestContext
from mcp.client.sse import sse_client
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer
from pydantic import FileUrl

from pgmcp.settings import Settings
from pgmcp.store import retention
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, cluster, everything
from tests.harness.haproxy import Haproxy
from tests.harness.nginx import Nginx
from tests.harness.processes import NodeProcess, nodes
from tests.harness.waiting import eventually

UPDATED, WATCHED = "notifications/resources/updated", "test://watched-resource"
NOT_FOUND = (404, -32600, "Session not found")

pytestmark = [
    pytest.mark.filterwarnings("ignore::mcp.MCPDeprecationWarning"),  # sampling, roots, logging and subscribe
]


@pytest.fixture(scope="module")
def members(shared_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NodeProcess]]:
    """Three nodes on one database."""
    logs = tmp_path_factory.mktemp("logs")
    with nodes(
        "examples/everything.py:mcp", 3, database_url=shared_database, log_dir=logs, args=["--access-log"]
    ) as started:
        yield started


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def balancer(request: pytest.FixtureRequest, members: list[NodeProcess]) -> Iterator[Nginx | Haproxy]:
    """A balancer in front of them."""
    kind = {"nginx": Nginx, "haproxy": Haproxy}[request.param]
    with kind([node.port for node in members]) as started:
        yield started


@pytest.fixture
def bases(members: list[NodeProcess]) -> list[str]:
    """Where each of the three nodes is."""
    return [node.url for node in members]


# The official Python client


@asynccontextmanager
async def connect(balancer: Nginx | Haproxy, **callbacks: Any) -> AsyncIterator[ClientSession]:
    async with (
        sse_client(f"{balancer.url}/sse") as (incoming, outgoing),
        ClientSession(incoming, outgoing, read_timeout_seconds=20, **callbacks) as session,
    ):
        await session.initialize()
        yield session


async def value(session: ClientSession, tool: str, **arguments: Any) -> Any:
    result = await session.call_tool(tool, arguments)
    assert isinstance(result, types.CallToolResult)
    assert result.structured_content is not None, result
    return result.structured_content["result"]


async def test_python_tools_progress_and_calls_at_the_same_time(balancer: Nginx | Haproxy) -> None:
    before = len(balancer.exchanges)
    async with connect(balancer) as session:
        assert {"count", "slow"} <= {tool.name for tool in (await session.list_tools()).tools}
        first = await value(session, "count")
        assert [await value(session, "count") for _ in range(6)] == list(range(first + 1, first + 7))
        reports: list[float] = []

        async def progress(progress: float, total: float | None, message: str | None) -> None:
            assert (total, message) == (10, None)
            reports.append(progress)

        await session.call_tool("slow", {"seconds": 0.2, "steps": 10}, progress_callback=progress)
        assert reports == list(range(1, 11))
        seconds = [0.02 * n for n in range(9, 0, -1)]
        answers = await asyncio.gather(*(value(session, "slow", seconds=one, steps=1) for one in seconds))
        assert answers == [f"1 steps in {one:g} s" for one in seconds]
        await session.send_ping()
    posts = [exchange for exchange in balancer.wait_for_exchanges(before + 20)[before:] if exchange.method == "POST"]
    assert {exchange.ports for exchange in posts} == {(port,) for port in balancer.ports}
    assert {(exchange.status, exchange.path) for exchange in posts} == {(202, "/messages/")}


@pytest.mark.parametrize("balancer", ["nginx"], indirect=True)
async def test_python_questions_to_the_client(balancer: Nginx | Haproxy) -> None:
    async def elicit(context: ClientRequestContext, params: types.ElicitRequestParams) -> types.ElicitResult:
        del context
        assert isinstance(params, types.ElicitRequestFormParams)
        form = params.requested_schema["properties"]
        return types.ElicitResult(action="accept", content={name: name for name in form})

    async def sample(
        context: ClientRequestContext, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult:
        del context
        content = types.TextContent(text=f"{len(params.messages)} message")
        return types.CreateMessageResult(role="assistant", content=content, model="none")

    async def roots(context: ClientRequestContext) -> types.ListRootsResult:
        del context
        return types.ListRootsResult(roots=[types.Root(uri=FileUrl("file:///root"), name="root")])

    async with connect(
        balancer, elicitation_callback=elicit, sampling_callback=sample, list_roots_callback=roots
    ) as session:
        for _ in range(3):  # so that the answers arrive at every node
            said = 'User response: action=accept, content={"username": "username", "email": "email"}'
            assert await value(session, "test_elicitation", message="Who are you?") == said
            assert await value(session, "test_sampling", prompt="Hello?") == "LLM response: 1 message"
            assert await value(session, "client_roots") == ["file:///root"]


@pytest.mark.parametrize("balancer", ["haproxy"], indirect=True)
async def test_python_notifications(balancer: Nginx | Haproxy) -> None:
    updated: asyncio.Queue[str] = asyncio.Queue()
    logged: list[Any] = []

    async def receive(message: Any) -> None:
        if isinstance(message, types.ResourceUpdatedNotification):
            updated.put_nowait(str(message.params.uri))

    async def log(params: types.LoggingMessageNotificationParams) -> None:
        logged.append(params.data)

    async with connect(balancer, message_handler=receive, logging_callback=log) as session:
        await session.subscribe_resource(WATCHED)
        for n in range(3):
            await value(session, "touch_watched_resource", text=f"change {n}")
            assert await asyncio.wait_for(updated.get(), 10) == WATCHED
        await session.unsubscribe_resource(WATCHED)
        assert await value(session, "touch_watched_resource", text="nobody listens") == 0
        assert updated.empty()
        await session.set_logging_level("warning")
        await value(session, "test_tool_with_logging")
        assert logged == []
        await session.set_logging_level("info")
        await value(session, "test_tool_with_logging")
        assert logged == ["Tool execution started", "Tool processing data", "Tool execution completed"]


@pytest.mark.parametrize("balancer", ["haproxy"], indirect=True)
async def test_python_cancels(balancer: Nginx | Haproxy) -> None:
    async with connect(balancer) as session:
        for _ in range(3):  # so that the cancellation arrives at every node
            begun = asyncio.Event()

            async def reported(
                progress: float, total: float | None, message: str | None, begun: asyncio.Event = begun
            ) -> None:
                begun.set()

            arguments = {"seconds": 60, "steps": 600}
            call = asyncio.create_task(session.call_tool("slow", arguments, progress_callback=reported))
            await asyncio.wait_for(begun.wait(), 10)
            assert await value(session, "slow_calls_running") == 1
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

            async def stopped() -> bool:
                return bool(await value(session, "slow_calls_running") == 0)

            await eventually(stopped, "the call has stopped")


# By hand


class Sse:
    """One client that speaks HTTP+SSE by hand; ``base`` chooses the node of every exchange."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self.endpoint = ""
        self.retry: int | None = None
        self._ids = itertools.count(1)
        self._streams: list[RawExchange] = []
        self._http = httpx.AsyncClient(
            headers=dict(headers or {}), timeout=httpx.Timeout(10, read=None), trust_env=False, verify=False
        )

    @property
    def session_id(self) -> str:
        return self.endpoint.partition("session_id=")[2]

    async def get(self, base: str, last_event_id: str | None = None) -> RawExchange:
        """GET the stream and take its endpoint event."""
        headers = {"accept": "text/event-stream"} | ({"last-event-id": last_event_id} if last_event_id else {})
        request = self._http.build_request("GET", f"{base}/sse", headers=headers)
        stream = await RawExchange(await self._http.send(request, stream=True)).begin()
        self._streams.append(stream)
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream"), stream.body
        first = await stream.next()
        assert first is not None
        assert (first.event, first.id) == ("endpoint", None)
        self.retry = first.retry
        self.endpoint = str(first.data)
        stream.seen.clear()
        return stream

    async def open(self, *bases: str) -> RawExchange:
        """Do the handshake over these nodes: the stream, ``initialize``, ``initialized``."""
        sse, initialize, initialized = (bases * 3)[:3]
        stream = await self.get(sse)
        params = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
        await self.send(initialize, "initialize", 0, **params)
        assert (await stream.response(0))["result"]["protocolVersion"] == "2024-11-05"
        await self.send(initialized, "notifications/initialized")
        return stream

    async def send(self, base: str, method: str, rpc_id: int | None = None, /, **params: Any) -> None:
        """POST a message that is accepted."""
        message = {"jsonrpc": "2.0", "method": method, "params": params} | ({} if rpc_id is None else {"id": rpc_id})
        answer = await self.post(base, message)
        assert (answer.status_code, answer.text) == (202, "Accepted")

    async def call(self, base: str, stream: RawExchange, tool: str, /, **arguments: Any) -> Any:
        """Call a tool and return its structured result."""
        rpc_id = next(self._ids)
        await self.send(base, "tools/call", rpc_id, name=tool, arguments=arguments)
        return (await stream.response(rpc_id))["result"]["structuredContent"]["result"]

    async def post(self, base: str, message: Any, endpoint: str | None = None) -> httpx.Response:
        """POST anything."""
        content = message if isinstance(message, bytes) else json.dumps(message).encode()
        where = f"{base}{self.endpoint if endpoint is None else endpoint}"
        return await self._http.post(where, content=content, headers={"content-type": "application/json"})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            await stream.close()
        await self._http.aclose()


PING = {"jsonrpc": "2.0", "id": 900, "method": "ping"}


def refusal(answer: httpx.Response) -> tuple[int, int, str]:
    """Status, code and text of a refusal."""
    error = answer.json()
    assert error["id"] is None
    return answer.status_code, error["error"]["code"], error["error"]["message"]


async def test_the_endpoint_is_a_path_of_the_same_origin(bases: Sequence[str]) -> None:
    async with Sse() as client:
        stream = await client.get(bases[0])
        at = urlsplit(client.endpoint)
        assert (at.scheme, at.netloc, at.path) == ("", "", "/messages/")
        assert len(client.session_id) >= 32
        assert stream.headers["cache-control"] == "no-cache, no-transform"


async def test_the_server_says_when_to_come_back(bases: Sequence[str]) -> None:
    async with Sse() as client:
        await client.get(bases[0])
        assert client.retry == 1000, "an EventSource waits for 3 s otherwise"


async def test_messages_may_be_posted_to_any_node(bases: Sequence[str]) -> None:
    async with Sse() as client:
        stream = await client.open(*bases)
        first = await client.call(bases[0], stream, "count")
        counted = [await client.call(bases[n % 3], stream, "count") for n in range(6)]
        assert counted == list(range(first + 1, first + 7))


async def test_answers_come_exactly_once_and_in_order_over_many_connections(bases: Sequence[str]) -> None:
    """12 calls, posted to all nodes in turn; the stream is cut after every twelfth event and goes on elsewhere."""
    calls, steps = range(100, 112), 8
    events: list[tuple[int, dict[str, Any]]] = []
    async with Sse() as client:
        stream = await client.open(*bases)
        whose, last = client.session_id, str(stream.last_event_id)
        for rpc_id in calls:
            arguments = {"seconds": 0.4 + rpc_id % 5 / 10, "steps": steps}
            meta = {"progressToken": rpc_id}
            await client.send(bases[rpc_id % 3], "tools/call", rpc_id, name="slow", arguments=arguments, _meta=meta)
        for connection in itertools.count(1):
            for _ in range(12):
                event = await stream.next()
                assert event is not None
                assert event.id is not None
                last = event.id
                events.append((int(last.rpartition(".")[2]), event.message or {}))
            if len(events) >= len(calls) * (steps + 1):
                break
            await stream.close()
            stream = await client.get(bases[connection % 3], last)
            assert client.session_id == whose
        with pytest.raises(TimeoutError):
            await stream.next(0.3)
    numbers = [number for number, _ in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(calls) * (steps + 1)))
    for rpc_id in calls:
        of_call = [
            message.get("params", {}).get("progress", "answer")
            for _, message in events
            if rpc_id in {message.get("id"), message.get("params", {}).get("progressToken")}
        ]
        assert of_call == [*range(1, steps + 1), "answer"]


@pytest.mark.parametrize("back", [0, 1])
async def test_a_client_that_says_what_it_has_goes_on_at_any_node(bases: Sequence[str], back: int) -> None:
    async with Sse() as client:
        stream = await client.open(bases[0])
        whose = client.session_id
        await client.send(bases[1], "resources/subscribe", 1, uri=WATCHED)
        await stream.response(1)
        last = stream.last_event_id
        await stream.close()
        await client.send(bases[2], "tools/call", 2, name="touch_watched_resource", arguments={"text": "in the gap"})
        resumed = await client.get(bases[back], last)
        assert client.session_id == whose
        while len(resumed.messages) < 2:
            await resumed.next()
        told, answer = sorted(resumed.messages, key=lambda message: "method" not in message)
        assert (told["method"], told["params"]["uri"]) == (UPDATED, WATCHED)
        assert (answer["id"], answer["result"]["structuredContent"]["result"]) == (2, 1)
        assert await client.call(bases[1], resumed, "touch_watched_resource", text="and after it") == 1
        await client.send(bases[1], "resources/unsubscribe", 3, uri=WATCHED)
        await resumed.response(3)


async def test_a_newer_connection_ends_the_older_one(bases: Sequence[str]) -> None:
    async with Sse() as client:
        older = await client.open(bases[0])
        newer = await client.get(bases[1], older.last_event_id)
        assert await older.next() is None
        assert older.error is None
        await client.call(bases[2], newer, "count")
        assert older.seen == older.seen[:1], "nothing came after the handshake"


@pytest.mark.parametrize("last", [None, f"{uuid4().hex}.7"], ids=["without an id", "with an unknown id"])
async def test_a_client_that_does_not_say_what_it_has_starts_anew(bases: Sequence[str], last: str | None) -> None:
    async with Sse() as client:
        stream = await client.open(bases[0])
        old = client.session_id
        await stream.close()
        stream = await client.get(bases[1], last)
        assert client.session_id != old
        await client.send(bases[2], "tools/list", 1)
        assert (await stream.response(1))["error"]["code"] == -32602, "it was not initialized"


async def test_methods_that_are_not_served(bases: Sequence[str]) -> None:
    async with Sse() as client, httpx.AsyncClient(trust_env=False, verify=False) as http:
        await client.open(bases[0])
        for method, path, allowed in (
            ("POST", "/sse", "GET"),
            ("DELETE", "/sse", "GET"),
            ("GET", client.endpoint, "POST"),
            ("DELETE", client.endpoint, "POST"),
        ):
            answer = await http.request(
                method, f"{bases[1]}{path}", json=PING if method == "POST" else None, headers={"accept": "*/*"}
            )
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


async def test_what_is_wrong_is_said_and_changes_nothing(bases: Sequence[str]) -> None:
    async with Sse() as client:
        stream = await client.open(bases[0])
        for bad, status, code in (
            (b"{", 400, -32700),
            (b"", 400, -32700),
            (b"\xff", 400, -32700),
            ([PING], 400, -32600),
            ([], 400, -32600),
            ({"jsonrpc": "2.0"}, 400, -32602),
            ({**PING, "id": None}, 400, -32600),
            ({**PING, "method": "a\0b"}, 400, -32602),
        ):
            assert refusal(await client.post(bases[1], bad))[:2] == (status, code), bad
        for endpoint in ("/messages/", "/messages", "/messages/?session_id=", "/messages/?sessionId=x"):
            assert refusal(await client.post(bases[1], PING, endpoint))[0] == 400, endpoint
        await client.call(bases[1], stream, "count")


async def test_unknown_sessions_are_not_found(bases: Sequence[str]) -> None:
    async with Sse() as client:
        await client.open(bases[0])
        for session_id in ("nobody", client.session_id[:-1], client.session_id + "0", "%00", "%ED%A0%80", "a%20b"):
            answer = await client.post(bases[1], PING, f"/messages/?session_id={session_id}")
            assert refusal(answer) == NOT_FOUND, session_id


async def test_logs_have_no_session_id(bases: Sequence[str], members: Sequence[NodeProcess]) -> None:
    async with Sse() as client:
        stream = await client.open(*bases)
        await client.call(bases[1], stream, "count")
        await client.post(bases[1], b"{")
        await client.post(bases[2], PING, f"{client.endpoint}0")
        last = stream.last_event_id
        await stream.close()
        stream = await client.get(bases[2], last)
        await client.call(bases[1], stream, "count")
        secret = client.session_id.rpartition("-")[2]
    assert len(secret) == 32
    for node in members:
        assert "pgmcp.access: POST /messages/ 202 in " in node.log
        assert secret not in node.log
        assert "session_id=" not in node.log


# Who is asking, and for how long


class Verifier:
    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id=token, scopes=["use"])


def guarded() -> MCPServer:
    """A server that asks who is there."""
    server = MCPServer(
        "guarded",
        token_verifier=Verifier(),
        auth=AuthSettings.model_validate(
            {
                "issuer_url": "https://issuer.example",
                "resource_server_url": "https://mcp.example/mcp",
                "required_scopes": ["use"],
                "validate_token_resource": False,
            }
        ),
    )
    server.add_tool(count_to_two, name="count")
    return server


def count_to_two() -> int:
    return 2


def bearer(who: str) -> dict[str, str]:
    return {"authorization": f"Bearer {who}"}


async def test_foreign_sessions_are_as_unknown_ones(database: str) -> None:
    async with cluster(database, guarded) as pair, Sse(bearer("ada")) as ada, Sse(bearer("eve")) as eve:
        stream = await ada.open(pair[0].url)
        for node in pair:
            foreign = await eve.post(node.url, PING, ada.endpoint)
            unknown = await eve.post(node.url, PING, "/messages/?session_id=nobody")
            assert refusal(foreign) == NOT_FOUND
            assert foreign.content == unknown.content
            await eve.get(node.url, stream.last_event_id)
            assert eve.session_id != ada.session_id, "eve has taken ada's stream"
        async with httpx.AsyncClient(trust_env=False, verify=False) as nobody:
            for method, path in (("GET", "/sse"), ("POST", ada.endpoint)):
                assert (await nobody.request(method, f"{pair[1].url}{path}")).status_code == 401
        assert await ada.call(pair[1].url, stream, "count") == 2


async def test_sessions_of_vanished_clients_expire(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(database, everything) as pair, Sse() as stays, Sse() as works, Sse() as goes:
        expire = pair[1].retention.expire
        kept, working, gone = [await client.open(pair[0].url) for client in (stays, works, goes)]
        calls = {"name": "slow", "arguments": {"seconds": 1.5, "steps": 1}}
        await works.send(pair[1].url, "tools/call", 50, **calls)
        last = gone.last_event_id
        await working.close()
        await gone.close()
        assert await expire() == [], "a client may come back within a minute"
        monkeypatch.setattr(retention, "CLIENT_GONE_SECONDS", 0.3)
        monkeypatch.setattr(Settings, "use_precision", 0.1)

        async def one_is_over() -> bool:
            return len(await expire()) == 1

        await eventually(one_is_over, "one session is over, and not the one that works")
        assert refusal(await goes.post(pair[1].url, PING)) == NOT_FOUND
        old = goes.session_id
        await goes.get(pair[1].url, last)
        assert goes.session_id != old
        assert (await works.post(pair[1].url, PING)).status_code == 202
        await eventually(one_is_over, "the session that worked is over when its work is")
        assert refusal(await works.post(pair[0].url, PING)) == NOT_FOUND
        await stays.call(pair[1].url, kept, "count")


# One transport's session is nothing to the other's endpoints


@pytest.fixture
async def two(database: str) -> AsyncIterator[Sequence[RunningNode]]:
    """Two nodes of a test's own."""
    async with cluster(database, everything) as pair:
        yield pair


async def test_messages_refuses_sessions_of_streamable_http(two: Sequence[RunningNode]) -> None:
    async with RawSession() as streamable, Sse() as client:
        await streamable.open(two[0].url)
        answer = await client.post(two[1].url, PING, f"/messages/?session_id={streamable.session_id}")
        assert refusal(answer) == NOT_FOUND


async def test_sse_does_not_take_streams_of_streamable_http(two: Sequence[RunningNode]) -> None:
    async with RawSession() as streamable, Sse() as client:
        await streamable.open(two[0].url)
        listening = await streamable.get(two[0].url)
        priming = await listening.next()
        assert priming is not None
        await client.get(two[1].url, priming.id)
        assert client.session_id != streamable.session_id
        with pytest.raises(TimeoutError):
            await listening.next(0.3)


async def test_streamable_http_refuses_sessions_of_http_sse(two: Sequence[RunningNode]) -> None:
    async with RawSession() as streamable, Sse() as client:
        stream = await client.open(two[0].url)
        streamable.session_id = client.session_id
        for exchange in (
            await streamable.post(two[1].url, PING),
            await streamable.get(two[1].url),
            await streamable.get(two[1].url, stream.last_event_id),
            await streamable.delete(two[1].url),
        ):
            assert exchange.status == 404
        await client.call(two[1].url, stream, "count")


async def test_a_strange_last_event_id_starts_anew(two: Sequence[RunningNode]) -> None:
    """An EventSource that is refused never comes back."""
    async with Sse() as client:
        for last in ("17", "a.b.c", "x" * 3000):
            await client.get(two[0].url, last)
            assert client.session_id


async def test_the_server_cannot_hang_up_on_a_client_that_cannot_resume(database: str) -> None:
    def served() -> MCPServer:
        server = MCPServer("closer")

        async def close(ctx: Context) -> int:
            await ctx.close_sse_stream()
            await ctx.close_standalone_sse_stream()
            return 1

        server.add_tool(close)
        return server

    async with cluster(database, served, 1) as [node], Sse() as client:
        stream = await client.get(node.url)
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
        await client.send(node.url, "initialize", 0, **params)  # the TypeScript clients ask for this over HTTP+SSE too
        await stream.response(0)
        await client.send(node.url, "notifications/initialized")
        assert await client.call(node.url, stream, "close") == 1
        with pytest.raises(TimeoutError):
            await stream.next(0.3)
