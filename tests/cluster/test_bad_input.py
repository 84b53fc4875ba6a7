"""What is malformed gets a clear error at the node where it arrives, and changes nothing anywhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass, field
from hashlib import sha512
from typing import Any

import httpx
import pytest
from mcp.server.mcpserver import MCPServer

from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything, tables_of
from tests.harness.waiting import eventually

PARSE_ERROR, INVALID_REQUEST, INVALID_PARAMS = -32700, -32600, -32602
ACCEPT = "application/json, text/event-stream"
LIMIT, BATCH = 20_000, 10
LONG = "".join(sha512(bytes([number])).hexdigest() for number in range(100))
"""12,800 characters that nothing makes shorter: more than an index of PostgreSQL takes."""


def message(method: str = "ping", **more: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "method": method, **more}


def ask(request_id: object = 1, method: str = "ping", **more: object) -> dict[str, object]:
    return message(method, id=request_id, **more)


INITIALIZE = ask(
    0,
    "initialize",
    params={"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}},
)


@dataclass(frozen=True)
class Case:
    """One bad exchange; ``code`` None means that the SDK answers with plain text."""

    name: str
    status: int
    code: int | None = INVALID_REQUEST
    body: object = field(default_factory=ask)
    method: str = "POST"
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """More headers; None takes one away."""
    answer: Mapping[str, str] = field(default_factory=dict)
    """Headers that the answer has."""

    @property
    def content(self) -> bytes | None:
        if self.method != "POST":
            return None
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def huge(digits: int) -> bytes:
    return b'{"jsonrpc":"2.0","id":%s,"method":"ping"}' % (b"9" * digits)


CASES = [
    # the body
    Case("empty body", 400, PARSE_ERROR, b""),
    Case("no JSON", 400, PARSE_ERROR, b"{"),
    Case("JSON and more", 400, PARSE_ERROR, json.dumps(ask()).encode() + b"x"),
    Case("not UTF-8", 400, PARSE_ERROR, b'{"jsonrpc":"2.0","id":1,"method":"\xff"}'),
    Case("lone surrogate", 400, PARSE_ERROR, b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}'),
    Case("surrogate in UTF-8", 400, PARSE_ERROR, b'{"jsonrpc":"2.0","id":1,"method":"\xed\xa0\x80"}'),
    Case("deep nesting", 400, PARSE_ERROR, b"[" * LIMIT),
    Case("deep objects", 400, PARSE_ERROR, b'{"a":' * 3000),
    Case("number with 5,000 digits", 400, PARSE_ERROR, huge(5000)),
    Case("too large", 413, INVALID_REQUEST, b" " * (LIMIT + 1)),
    Case("null", 400, INVALID_PARAMS, b"null"),
    Case("text", 400, INVALID_PARAMS, b'"ping"'),
    Case("empty object", 400, INVALID_PARAMS, {}),
    Case("JSON-RPC 1.0", 400, INVALID_PARAMS, {"jsonrpc": "1.0", "id": 1, "method": "ping"}),
    Case("params are a list", 400, INVALID_PARAMS, ask(params=[1])),
    Case("method is a number", 400, INVALID_PARAMS, ask(method=1)),  # type: ignore[arg-type]  # that is the case
    Case("response without id", 400, INVALID_PARAMS, {"jsonrpc": "2.0", "result": {}}),
    Case("result is a list", 400, INVALID_PARAMS, {"jsonrpc": "2.0", "id": 1, "result": [1]}),
    *(
        Case(f"id is {name}", 400, INVALID_REQUEST, b'{"jsonrpc":"2.0","id":%s,"method":"ping"}' % text)
        for name, text in {
            "null": b"null",
            "a fraction": b"1.5",
            "a truth": b"true",
            "a list": b"[1]",
            "NaN": b"NaN",
            "last a list": b'1,"id":[1]',
        }.items()
    ),
    Case("id of 12,800 characters", 400, INVALID_REQUEST, ask(LONG)),
    Case("NUL in the method", 400, INVALID_PARAMS, ask(method="p\0")),
    Case("NUL in the tool's name", 400, INVALID_PARAMS, ask(method="tools/call", params={"name": "a\0b"})),
    Case("NUL in the prompt's name", 400, INVALID_PARAMS, ask(method="prompts/get", params={"name": "\0"})),
    Case("NUL in the uri", 400, INVALID_PARAMS, ask(method="resources/read", params={"uri": "x:\0"})),
    Case("NUL in a notification's method", 400, INVALID_PARAMS, message("notifications/\0")),
    # batches: this session speaks 2025-11-25
    Case("batch", 400, INVALID_REQUEST, [ask(1), ask(2)]),
    Case("batch of one", 400, INVALID_REQUEST, [message("notifications/x")]),
    Case("empty batch", 400, INVALID_REQUEST, []),
    # headers
    Case("no session id", 400, INVALID_REQUEST, headers={"mcp-session-id": None}),
    Case("empty session id", 400, INVALID_REQUEST, headers={"mcp-session-id": ""}),
    Case("unknown session id", 404, INVALID_REQUEST, headers={"mcp-session-id": "n1-" + "0" * 32}),
    Case("session id with blanks", 404, INVALID_REQUEST, headers={"mcp-session-id": "a b"}),
    Case("session id that is no ASCII", 404, INVALID_REQUEST, headers={"mcp-session-id": "\xe9"}),
    Case("notification for no session", 400, INVALID_REQUEST, message("x"), headers={"mcp-session-id": None}),
    Case("notification for an unknown session", 404, INVALID_REQUEST, message("x"), headers={"mcp-session-id": "x"}),
    Case("response for an unknown session", 404, body={"jsonrpc": "2.0", "id": 1, "result": {}},
         headers={"mcp-session-id": "x"}),
    Case("initialize in a session", 400, INVALID_REQUEST, INITIALIZE),
    Case("initialize in an unknown session", 404, INVALID_REQUEST, INITIALIZE, headers={"mcp-session-id": "x"}),
    Case("initialize without parameters", 400, INVALID_PARAMS, ask(method="initialize"),
         headers={"mcp-session-id": None}),
    Case("initialize as a notification", 400, INVALID_REQUEST, message("initialize"),
         headers={"mcp-session-id": None}),
    Case("accepts JSON only", 406, INVALID_REQUEST, headers={"accept": "application/json"}),
    Case("accepts events only", 406, INVALID_REQUEST, headers={"accept": "text/event-stream"}),
    Case("accepts HTML", 406, INVALID_REQUEST, headers={"accept": "text/html"}),
    Case("no Accept", 406, INVALID_REQUEST, headers={"accept": ""}),
    Case("no content type", 400, None, headers={"content-type": None}),
    Case("plain text", 400, None, headers={"content-type": "text/plain"}),
    Case("wrong Host", 421, None, headers={"host": "evil.example"}),
    Case("wrong Origin", 403, None, headers={"origin": "http://evil.example"}),
    # other verbs
    Case("PUT", 405, INVALID_REQUEST, method="PUT", answer={"allow": "GET, POST, DELETE"}),
    Case("PATCH", 405, INVALID_REQUEST, method="PATCH", answer={"allow": "GET, POST, DELETE"}),
    Case("GET without session", 400, INVALID_REQUEST, method="GET", headers={"mcp-session-id": None}),
    Case("GET of an unknown session", 404, INVALID_REQUEST, method="GET", headers={"mcp-session-id": "x"}),
    Case("GET accepts JSON", 406, INVALID_REQUEST, method="GET", headers={"accept": "application/json"}),
    Case("GET with wrong Host", 421, None, method="GET", headers={"host": "evil.example"}),
    Case("GET with wrong Origin", 403, None, method="GET", headers={"origin": "http://evil.example"}),
    *(
        Case(f"Last-Event-ID {bad[:20]!r}", 400, INVALID_REQUEST, method="GET", headers={"last-event-id": bad})
        for bad in ("x", "1", ".", "0.0", "0" * 32, "0" * 32 + ".", "0" * 32 + ".-1", "0" * 32 + ".x", "g" * 32 + ".1",
                    "0" * 32 + "." + "9" * 19, "0" * 32 + ".\xb2", "\xe9.1", "0" * 5000 + ".1")
    ),
    Case("resume in an unknown session", 404, INVALID_REQUEST, method="GET",
         headers={"mcp-session-id": "x", "last-event-id": "0" * 32 + ".1"}),
    Case("DELETE without session", 400, INVALID_REQUEST, method="DELETE", headers={"mcp-session-id": None}),
    Case("DELETE of an unknown session", 404, INVALID_REQUEST, method="DELETE", headers={"mcp-session-id": "x"}),
]  # fmt: skip

OLD_CASES = [
    Case("empty batch", 400, INVALID_REQUEST, []),
    Case("batch that is too large", 400, INVALID_REQUEST, [message("notifications/x")] * (BATCH + 1)),
    Case("same id twice", 400, INVALID_REQUEST, [ask(1), ask(1, "tools/list")]),
    Case("initialize in a batch", 400, INVALID_REQUEST, [ask(1), INITIALIZE]),
    Case("initialize alone in a batch", 400, INVALID_REQUEST, [INITIALIZE]),
    Case("one of them is no message", 400, INVALID_PARAMS, [message("notifications/x"), {}]),
    Case("one of them has a bad id", 400, INVALID_REQUEST, [message("notifications/x"), ask(None)]),
    Case("a batch in a batch", 400, INVALID_PARAMS, [[ask(1)]]),
    Case("batch for no session", 400, INVALID_REQUEST, [ask(1)], headers={"mcp-session-id": None}),
    Case("batch for an unknown session", 404, INVALID_REQUEST, [ask(1)], headers={"mcp-session-id": "x"}),
]


async def check(http: httpx.AsyncClient, base: str, session: RawSession, case: Case) -> None:
    headers = {
        "accept": ACCEPT if case.method == "POST" else "text/event-stream",
        "content-type": "application/json",
        "mcp-session-id": session.session_id,
        **case.headers,
    }
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items() if value is not None}
    async with http.stream(case.method, f"{base}/mcp", headers=encoded, content=case.content) as response:
        assert response.status_code == case.status, f"{response.status_code} {response.headers}"
        body = await response.aread()
        assert not response.headers.get("content-type", "").startswith("text/event-stream")
        for name, value in case.answer.items():
            assert response.headers[name] == value
    if case.code is None:
        assert body
    else:
        assert response.headers["content-type"] == "application/json"
        error = json.loads(body)
        assert (error["jsonrpc"], error["id"]) == ("2.0", None)
        assert error["error"]["code"] == case.code, error
        assert error["error"]["message"]


@pytest.mark.parametrize(("version", "cases"), [("2025-11-25", CASES), ("2025-03-26", OLD_CASES)])
async def test_what_is_malformed_gets_an_error_and_changes_nothing(
    database: str, subtests: pytest.Subtests, caplog: pytest.LogCaptureFixture, version: str, cases: list[Case]
) -> None:
    async with (
        cluster(database, everything, 2, max_body=LIMIT, max_batch=BATCH) as nodes,
        tables_of(database) as tables,
        httpx.AsyncClient(trust_env=False, verify=False, timeout=10) as http,
        RawSession(protocol_version=version) as session,
    ):
        http.headers.clear()
        await session.open(nodes[0].url)
        await session.call(nodes[1].url, "ping")
        sink = "select count(*) from pgmcp.streams where sink is not null"
        await eventually(lambda: _is(tables.value(sink), 0), "streams are released")
        for case in cases:
            for place, node in zip(("owner", "other"), nodes, strict=True):
                with subtests.test(case.name, at=place):
                    before = await tables.counts()
                    await check(http, node.url, session, case)
                    assert await tables.counts() == before
        assert (await session.call(nodes[0].url, "ping"))["result"] == {}
        failures = [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}]
        assert failures == []


async def _is(value: Awaitable[object], expected: object) -> bool:
    return await value == expected


async def test_a_body_over_the_limit_without_a_declared_length(database: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 1000

    async with (
        cluster(database, everything, 1, max_body=LIMIT) as [node],
        tables_of(database) as tables,
        httpx.AsyncClient(trust_env=False, verify=False) as http,
    ):
        before = await tables.counts()
        headers = {"accept": ACCEPT, "content-type": "application/json", "mcp-session-id": "x"}
        response = await http.post(f"{node.url}/mcp", headers=headers, content=pieces())
        assert response.status_code == 413
        assert response.json()["error"]["code"] == INVALID_REQUEST
        assert await tables.counts() == before


async def test_there_is_one_endpoint(database: str) -> None:
    async with cluster(database, everything, 1) as [node], tables_of(database) as tables, RawSession() as session:
        before = await tables.counts()
        for path in ("/mcp/x", "/mcpx", "/other", "/"):
            session.path = path
            assert (await session.initialize(node.url)).status == 404, path
        assert await tables.counts() == before


# What is unusual and good


async def test_unusual_messages_are_served(database: str) -> None:
    async with cluster(database, everything, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        for node in nodes:
            for odd in (0, -1, 2**53, 2**63, 10**100, "", "1", "\0", "ä\u2028🙂", "x" * 500):
                exchange = await session.request(node.url, "ping", request_id=odd)
                assert await exchange.response(odd) == {"jsonrpc": "2.0", "id": odd, "result": {}}
            exchange = await session.post(node.url, b'{"jsonrpc":"2.0","id":1,"id":2,"method":"x","method":"ping"}')
            assert (await exchange.response(2))["result"] == {}
            text = "\0 \ud83d\ude42 \u2028 \x7f" + "9" * 4000
            echo = await session.call(node.url, "resources/read", {"uri": "test://template/7/data", "x": text})
            assert "result" in echo
            unknown = await session.call(node.url, "no/such")
            assert unknown["error"]["code"] == -32601
            nothing = await session.call(node.url, "tools/call", {"name": "no such tool"})
            assert "error" in nothing or nothing["result"]["isError"]
            foreign = await session.call(node.url, "tools/call", {"name": 7})
            assert foreign["error"]["code"] == INVALID_PARAMS


async def test_a_long_uri_can_be_subscribed_to(database: str) -> None:
    async with cluster(database, everything, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        for method in ("resources/subscribe", "resources/unsubscribe"):
            answer = await session.call(nodes[1].url, method, {"uri": f"test://{LONG}"})
            assert answer["result"] == {}
        assert (await session.call(nodes[0].url, "ping"))["result"] == {}


async def test_strange_notifications_leave_the_session_alive(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(database, everything, 1) as [node], RawSession() as session:
        await session.open(node.url)
        for params in ({"requestId": [1]}, {"requestId": {"a": 1}}, {"requestId": None}, {"requestId": 1.5}, {}, None):
            assert (await session.notify(node.url, "notifications/cancelled", params)).status == 202
            odd = {**(params or {}), "progressToken": (params or {}).get("requestId"), "progress": 1}
            assert (await session.notify(node.url, "notifications/progress", odd)).status == 202
            error = {"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": "x"}}
            assert (await session.post(node.url, error)).status == 202
            assert (await session.call(node.url, "ping"))["result"] == {}
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


# Request ids


class Gate:
    """A server whose tool waits for the test; the truth about what ran is here."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.open = asyncio.Event()

    def server(self) -> MCPServer:
        server = MCPServer("gate")

        @server.tool()
        async def work(text: str) -> str:
            self.ran.append(text)
            await self.open.wait()
            return text

        @server.tool()
        async def quick(text: str) -> str:
            self.ran.append(text)
            return text

        return server


def work(text: str, tool: str = "work") -> dict[str, Any]:
    return {"name": tool, "arguments": {"text": text}}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
async def test_a_running_id_with_another_body_is_refused(database: str, first: int, second: int) -> None:
    gate = Gate()
    async with (
        cluster(database, gate.server, 2) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        exchange = await session.request(nodes[first].url, "tools/call", work("a"), request_id=9)
        await eventually(lambda: gate.ran == ["a"], "the first runs")
        before = await tables.counts()
        for other in (work("b"), work("a", "quick")):
            refused = await session.request(nodes[second].url, "tools/call", other, request_id=9)
            assert (refused.status, refused.json()["error"]["code"]) == (400, INVALID_REQUEST)
        assert await tables.counts() == before
        # the text "9" is another id than the number 9
        text = await session.request(nodes[second].url, "tools/call", work("c", "quick"), request_id="9")
        assert "result" in await text.response("9")
        gate.open.set()
        assert (await exchange.response(9))["result"]["structuredContent"] == {"result": "a"}
        assert gate.ran == ["a", "c"]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
async def test_a_repeated_request_joins_the_one_that_runs(database: str, first: int, second: int) -> None:
    gate = Gate()
    async with cluster(database, gate.server, 2) as nodes, tables_of(database) as tables, RawSession() as session:
        await session.open(nodes[0].url)
        one = await session.request(nodes[first].url, "tools/call", work("a"), request_id=9)
        await eventually(lambda: gate.ran == ["a"], "the first runs")
        before = await tables.counts()
        two = await session.request(nodes[second].url, "tools/call", work("a"), request_id=9)
        assert await tables.counts() == before
        assert await one.rest() is not None
        assert one.error is None
        gate.open.set()
        assert (await two.response(9))["result"]["structuredContent"] == {"result": "a"}
        assert await two.next() is None
        assert one.messages == []
        assert gate.ran == ["a"]


@pytest.mark.parametrize("second", [0, 1])
async def test_the_same_request_at_the_same_moment_runs_once(database: str, second: int) -> None:
    gate = Gate()
    async with cluster(database, gate.server, 2) as nodes, tables_of(database) as tables, RawSession() as session:
        await session.open(nodes[0].url)
        for turn in range(20):
            gate.open.clear()
            twins = (session.request(nodes[n].url, "tools/call", work(str(turn)), request_id=turn) for n in (0, second))
            exchanges = await asyncio.gather(*twins)
            gate.open.set()
            for exchange in exchanges:
                assert exchange.status == 200, exchange.body
                await exchange.rest()
            [answer] = [message for exchange in exchanges for message in exchange.messages]
            assert answer["result"]["structuredContent"] == {"result": str(turn)}
        assert gate.ran == [str(turn) for turn in range(20)]
        orphans = (
            "select count(*) from pgmcp.streams s where s.kind = 'request' "
            "and not exists (select from pgmcp.requests r where r.stream = s.id)"
        )
        assert await tables.value(orphans) == 0


async def test_an_id_is_free_again_when_its_answer_was_read(database: str) -> None:
    gate = Gate()
    async with cluster(database, gate.server, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        for turn in range(100):
            text = "same" if turn % 3 else str(turn)
            exchange = await session.request(nodes[turn % 2].url, "tools/call", work(text, "quick"), request_id=1)
            await exchange.rest()
            assert [message["id"] for message in exchange.messages] == [1]
            assert exchange.messages[0]["result"]["structuredContent"] == {"result": text}
        assert len(gate.ran) == 100


# Batches of 2025-03-26


@pytest.mark.parametrize(("response", "edge"), [("sse", 0), ("sse", 1), ("json", 1), ("auto", 1)])
async def test_batches_are_served(database: str, response: str, edge: int) -> None:
    async with (
        cluster(database, everything, 2, response=response) as nodes,
        RawSession(protocol_version="2025-03-26") as session,
    ):
        await session.open(nodes[0].url)
        batch = [
            message("notifications/roots/list_changed"),
            ask("a", "tools/call", params={"name": "count", "arguments": {}}),
            ask(2),
            message("notifications/x"),
            ask(3, "no/such"),
        ]
        exchange = await session.post(nodes[edge].url, batch)
        if response == "sse":
            assert exchange.is_stream
            await exchange.rest()
            answers = exchange.messages
        elif exchange.is_stream:  # auto: it took longer than plain JSON may
            await exchange.rest()
            answers = exchange.messages
        else:
            assert exchange.headers["content-type"] == "application/json"
            answers = exchange.json()
            assert isinstance(answers, list)
        by_id = {answer["id"]: answer for answer in answers}
        assert len(answers) == 3
        assert by_id["a"]["result"]["structuredContent"] == {"result": 1}
        assert by_id[2]["result"] == {}
        assert by_id[3]["error"]["code"] == -32601
        alone = await session.post(nodes[edge].url, [ask(4)])
        assert (await alone.response(4) if alone.is_stream else alone.json()[0])["result"] == {}
        accepted = await session.post(nodes[edge].url, [message("notifications/x"), message("notifications/y")])
        assert (accepted.status, accepted.body) == (202, b"")


@pytest.mark.parametrize("edge", [0, 1])
async def test_a_batch_with_a_running_id_is_refused_as_a_whole(database: str, edge: int) -> None:
    gate = Gate()
    async with (
        cluster(database, gate.server, 2) as nodes,
        tables_of(database) as tables,
        RawSession(protocol_version="2025-03-26") as session,
    ):
        await session.open(nodes[0].url)
        exchange = await session.request(nodes[0].url, "tools/call", work("a"), request_id=9)
        await eventually(lambda: gate.ran == ["a"], "the first runs")
        before = await tables.counts()
        batch = [message("notifications/x"), ask(8, "tools/call", params=work("b", "quick")), ask(9)]
        refused = await session.post(nodes[edge].url, batch)
        assert (refused.status, refused.json()["error"]["code"]) == (400, INVALID_REQUEST)
        assert await tables.counts() == before
        gate.open.set()
        assert "result" in await exchange.response(9)
        assert gate.ran == ["a"]


@pytest.mark.parametrize("edge", [0, 1])
async def test_a_batch_may_mix_everything(database: str, edge: int) -> None:
    """Its requests share a stream, also when the first is answered long before the last one is handed over."""
    async with cluster(database, everything, 2) as nodes, RawSession(protocol_version="2025-03-26") as session:
        await session.open(nodes[0].url)
        for turn in range(5):
            early = 1000 + turn
            assert (
                await session.notify(nodes[edge].url, "notifications/cancelled", {"requestId": early})
            ).status == 202
            mixed = [
                ask(3 * turn),
                message("notifications/initialized"),
                ask(early),
                message("notifications/initialized"),
                {"jsonrpc": "2.0", "id": 99, "result": {}},
                ask(3 * turn + 1),
            ]
            exchange = await session.post(nodes[edge].url, mixed)
            await exchange.rest()
            assert {answer["id"]: "result" in answer for answer in exchange.messages} == {
                3 * turn: True,
                early: False,
                3 * turn + 1: True,
            }
        assert (await session.call(nodes[edge].url, "ping"))["result"] == {}
