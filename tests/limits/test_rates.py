"""Rates: who asks for too much in a second is told when to come again, and costs nothing; others go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mcp.server.mcpserver import MCPServer
from starlette.requests import Request

from pgmcp.settings import Settings
from pgmcp.types import ANONYMOUS, Principal
from pgmcp.web import rates
from pgmcp.web.admission import Caller
from pgmcp.web.connection import Connection
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.rates import Bucket, Rates
from tests.harness.clients import RawExchange, RawSession
from tests.harness.clock import FakeClock
from tests.harness.cluster import cluster, everything, tables_of
from tests.harness.modern import Modern

ADA, BOB = Caller(Principal("c", None, "ada"), ""), Caller(ANONYMOUS, "10.0.0.1")
LONG = 333.0
"""Seconds until a caller has another one, in the tests with nodes."""


def at(address: str, path: str = "/mcp") -> RawSession:
    return RawSession(headers={"x-forwarded-for": address}, path=path)


def refused(exchange: RawExchange, word: str) -> None:
    assert exchange.status == 429, f"{exchange.status} {exchange.body!r}"
    assert LONG - 60 < int(exchange.headers["retry-after"]) <= LONG + 1
    answer = exchange.json()
    assert (answer["id"], answer["error"]["code"]) == (None, -32600)
    assert word in answer["error"]["message"]


def test_a_bucket_fills_at_its_rate_and_says_when_there_is_more() -> None:
    clock = FakeClock()
    bucket = Bucket(2, clock)
    assert [bucket.take(ADA) for _ in range(20)] == [0] * 20  # ten seconds' worth
    assert bucket.take(ADA) == 0.5
    assert bucket.take(BOB) == 0
    clock.jump(0.25)
    assert bucket.take(ADA) == 0.25  # who asks in vain loses nothing
    clock.jump(0.25)
    assert (bucket.take(ADA), bucket.take(ADA)) == (0, 0.5)
    clock.jump(3600)
    assert [bucket.take(ADA) for _ in range(21)] == [0] * 20 + [0.5]


def test_a_slow_rate_lets_one_in_and_no_rate_everything() -> None:
    clock = FakeClock()
    assert (Bucket(0.01, clock).take(ADA), Bucket(0, clock).take(ADA)) == (0, 0)
    slow, free = Bucket(0.01, clock), Bucket(0, clock)
    assert (slow.take(ADA), slow.take(ADA)) == (0, 100)
    assert not any(free.take(ADA) for _ in range(1000))
    assert len(free) == 0


def test_few_buckets_are_kept_and_those_of_whoever_asks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "CALLERS", 10)
    bucket = Bucket(0.01, FakeClock())
    bucket.take(ADA)
    for number in range(100):
        bucket.take(Caller(ANONYMOUS, f"10.0.0.{number}"))
        assert bucket.take(ADA) > 0
    assert len(bucket) == 10


async def silent(*_: object) -> Any:
    """What an exchange that does not speak is given to speak with."""
    raise AssertionError


def test_a_proxy_that_is_not_believed_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def call(peer: str, forwarded: str = "") -> HttpExchange:
        headers = [(b"x-forwarded-for", forwarded.encode())] if forwarded else []
        request = Request({"type": "http", "method": "POST", "headers": headers, "client": (peer, 1)})
        return HttpExchange(request, Connection(silent, silent, 1))

    opened = Rates(Settings(), FakeClock())
    for known in (call("10.0.0.1"), call("10.0.0.1", "10.0.0.9, 10.0.0.1"), call("10.0.0.1", "10.0.0.1:5000")):
        opened.opening(known)  # nobody stands between, or it is believed: the client's address was taken from there
    assert caplog.messages == []
    for _ in range(2):
        opened.opening(call("10.0.0.7", "203.0.113.1, evil\x1b[31m"))
    assert [message.split()[0] for message in caplog.messages] == ["10.0.0.7"]
    assert "evil" not in caplog.text


async def test_sessions_are_opened_at_a_rate(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both paths; a POST without a session id that is no handshake counts as well."""
    monkeypatch.setattr(rates, "BURST_SECONDS", 3 * LONG)
    async with (
        cluster(database, everything, 1, initialize_rate=1 / LONG) as [node],
        tables_of(database) as tables,
        at("10.0.0.1") as flood,
        at("10.0.0.1", "/sse") as older,
        at("10.0.0.2") as other,
    ):
        await flood.open(node.url)
        stream = await older.get(node.url)
        await stream.next()
        async with at("10.0.0.1") as junk:
            assert (await junk.post(node.url, b"{")).status == 400
            before = await tables.counts()
            refused(await junk.post(node.url, b"{"), "sessions")
            refused(await junk.initialize(node.url), "sessions")
        refused(await older.get(node.url), "sessions")
        gone = {"last-event-id": "0" * 32 + ".1"}  # it would be given another session
        refused(await older.get(node.url, headers=gone), "sessions")
        assert await tables.counts() == before
        for session in (flood, other):
            if session is other:
                await session.open(node.url)
            assert (await session.call(node.url, "ping"))["result"] == {}


@pytest.mark.parametrize("path", ["/mcp", "/messages/?session_id=x", "modern"])
async def test_messages_are_taken_at_a_rate_in_every_transport(
    database: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(rates, "BURST_SECONDS", 3 * LONG)
    headers = {"x-forwarded-for": "10.0.0.1"}
    async with (
        cluster(database, everything, 1, rate=1 / LONG) as [node],
        tables_of(database) as tables,
        at("10.0.0.2") as other,
        RawSession(headers=headers, path="/mcp" if path == "modern" else path) as session,
        Modern(headers) as client,
    ):
        session.session_id = "nobody's"

        async def send() -> RawExchange:
            if path == "modern":
                return await client.request(node.url, "server/discover")
            return await session.request(node.url, "ping")

        statuses = [(await send()).status for _ in range(3)]
        assert 429 not in statuses
        before = await tables.counts()
        refused(await send(), "messages")
        refused(await session.post(node.url, b"{"), "messages")  # it is not looked into
        assert (await session.delete(node.url)).status in {404, 405}  # no POST
        assert await tables.counts() == before
        await other.open(node.url)
        assert (await other.call(node.url, "ping"))["result"] == {}


async def test_a_caller_is_its_principal_where_there_is_one(
    database: str, private: Callable[[], MCPServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "BURST_SECONDS", 2 * LONG)
    async with cluster(database, private, 1, initialize_rate=1 / LONG) as [node]:
        for who, status in (("ada", 200), ("ada", 200), ("ada", 429), ("bob", 200)):
            async with RawSession(headers={"authorization": f"Bearer {who}"}) as session:
                assert (await session.initialize(node.url)).status == status
