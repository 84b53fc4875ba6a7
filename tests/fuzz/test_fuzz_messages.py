"""Malformed and odd JSON-RPC: never a 500, never a hang, the session goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.bodies import dumps
from tests.fuzz.conftest import Target

odd = settings(
    derandomize=True,
    database=None,
    max_examples=70,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
texts = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(["\0", "\ud800", "\U0001f642", "x" * 3000])
numbers = st.integers() | st.floats() | st.sampled_from([2**53, 2**64, -(10**400), 1e308, 5e-324])
scalars = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
methods = st.sampled_from([
    "ping", "tools/call", "tools/list", "resources/read", "resources/subscribe", "resources/unsubscribe",
    "prompts/get", "completion/complete", "logging/setLevel", "initialize", "notifications/initialized",
    "notifications/cancelled", "notifications/progress", "notifications/roots/list_changed", "sampling/createMessage",
    "server/discover", "subscriptions/listen", "", "rpc.x",
]) | texts  # fmt: skip
params = anything | st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["count", "test_simple_text", "test_error_handling"]) | anything,
        "arguments": anything,
        "uri": anything,
        "level": anything,
        "requestId": anything,
        "progressToken": anything,
        "progress": anything,
        "cursor": anything,
        "_meta": anything,
        "protocolVersion": anything,
        "capabilities": anything,
        "clientInfo": anything,
        "ref": anything,
        "argument": anything,
    },
)
message = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0") | scalars},
    optional={
        "id": st.integers(0, 5) | texts | anything,
        "method": methods,
        "params": params,
        "result": anything,
        "error": anything | st.fixed_dictionaries({"code": numbers, "message": texts}),
        "extra": anything,
    },
)
request = st.fixed_dictionaries(
    {
        "jsonrpc": st.just("2.0"),
        "id": st.integers() | st.text(max_size=5),
        "method": methods,
        "params": st.dictionaries(texts, anything, max_size=3) | params,
    }
)
notification = st.fixed_dictionaries({"jsonrpc": st.just("2.0"), "method": methods, "params": params})
GOOD = {200, 202, 400, 404, 406, 409, 413, 415, 429}
cut = st.tuples(st.binary(max_size=3), st.integers(0, 40))


def check(watched: Target, body: bytes, path: str = "/mcp") -> None:
    answer = watched.post(path, body)
    assert answer.status in GOOD, answer.raw[:500]


@odd
@given(value=message | anything | st.lists(message, max_size=4))
@example(value=[])
@example(value=[[]])
@example(value={"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"x": float("nan")}})
@example(value=[{"jsonrpc": "2.0", "method": "notifications/x", "params": {"x": 1e999}}])
@example(value={"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": {"a": [None]}}})
@example(value={"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": float("nan")}})
@example(value={"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": []}})
@example(value={"jsonrpc": "2.0", "id": -(10**1500), "method": "ping"})
@example(value={"jsonrpc": "2.0", "id": 1, "error": {"code": 10**400, "message": ""}})
@example(value={"jsonrpc": "2.0", "id": 10**400, "result": {}})
def test_messages(watched: Target, value: object) -> None:
    check(watched, dumps(value))


@odd
@given(value=request | notification | st.lists(request | notification, min_size=1, max_size=3))
def test_messages_that_look_right(watched: Target, value: object) -> None:
    check(watched, dumps(value))


@odd
@given(value=message, cut=cut)
def test_json_that_is_damaged(watched: Target, value: object, cut: tuple[bytes, int]) -> None:
    body, (piece, place) = dumps(value), cut
    check(watched, body[:place] + piece + body[place:])
    check(watched, body[: len(body) - place])


@odd
@given(value=message | anything)
def test_http_sse_messages(watched: Target, value: object) -> None:
    """Nobody has this session, but the body is read before it is looked for."""
    check(watched, dumps(value), "/messages/?session_id=nobody")


@settings(odd, max_examples=20)
@given(
    piece=st.lists(
        st.sampled_from(
            [b"[]", b"{}", b'""', b"1", b'"\\\\"', b'"\\""', b'{"":[]}', b"[[[[]]]]", b'"[{,:"', b"1e-300"]
        ),
        min_size=1,
        max_size=4,
    ),
    size=st.integers(1, 95_000),
    damage=st.sampled_from([b"", b'"', b"\\", b"]", b"}"]),
)
def test_bombs(watched: Target, piece: list[bytes], size: int, damage: bytes) -> None:
    """As much as a body takes, on every path that parses."""
    one = b",".join(piece)
    many = b",".join([one] * (size // (len(one) + 1) + 1))
    body = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"x","arguments":{"x":[%s]%s}}}' % (
        many,
        damage,
    )
    check(watched, body)
    check(watched, body, "/messages/?session_id=nobody")
    modern = b"mcp-protocol-version: 2026-07-28\r\nmcp-method: tools/call\r\nmcp-name: x\r\n"
    headers = b"accept: application/json, text/event-stream\r\ncontent-type: application/json\r\n"
    assert watched.exchange("POST", "/mcp", headers + modern, body).status in GOOD


@pytest.mark.parametrize("deep", [50, 98, 99, 100, 101, 150, 199, 200, 201, 1000, 20_000])
@pytest.mark.parametrize("kind", ["[]", "{}"])
def test_depth(watched: Target, deep: int, kind: str) -> None:
    opening = b"[" if kind == "[]" else b'{"a":'
    inner = opening * deep + b"1" + kind[1].encode() * deep
    check(watched, b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":%s}}' % inner)
    check(watched, b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%s}}' % inner)


@pytest.mark.parametrize("digits", [100, 1999, 2000, 2001, 4299, 4300, 4301, 50_000])
def test_numbers(watched: Target, digits: int) -> None:
    number = b"9" * digits
    for text in (number, b"-" + number, b"1." + number, b"1e" + number, b"0." + number + b"e" + number):
        check(watched, b'{"jsonrpc":"2.0","id":%s,"method":"ping"}' % text)
        check(watched, b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":%s}}' % text)
        check(watched, b'[{"jsonrpc":"2.0","method":"notifications/x","params":{"x":%s}}]' % text)
        cancelled = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":%s}}'
        check(watched, cancelled % text)
        check(watched, b'{"jsonrpc":"2.0","id":%s,"result":{}}' % text)


def test_answers_to_initialize(watched: Target) -> None:
    """Odd handshakes open no session that stays."""
    odd_params: tuple[Any, ...] = (
        None, {}, [], {"protocolVersion": 1}, {"capabilities": "x"},
        {"protocolVersion": "x" * 5000, "capabilities": {}, "clientInfo": {"name": 1}},
    )  # fmt: skip
    for params in odd_params:
        body = json.dumps({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}).encode()
        headers = b"accept: application/json, text/event-stream\r\ncontent-type: application/json\r\n"
        answer = watched.exchange("POST", "/mcp", headers, body)
        assert answer.status == 400, answer.raw[:300]
