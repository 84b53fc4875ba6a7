"""A batch (2025-03-26) that is sent again is treated as a single request that is: all of it, or none (G5)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from mcp.server.mcpserver import MCPServer

from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import Tables, cluster, tables_of
from tests.harness.waiting import eventually

INVALID_REQUEST = -32600
UNFINISHED = "select count(*) from pgmcp.requests where finished_at is null"
SINKS = "select count(*) from pgmcp.streams where sink is not null"
NEWS = {"jsonrpc": "2.0", "method": "notifications/roots/list_changed"}

both = pytest.mark.parametrize("edge", [0, 1])


class Gate:
    """A server whose slow tool waits for the test; the truth about what ran is here."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.open = asyncio.Event()

    def server(self) -> MCPServer:
        server = MCPServer("gate")

        @server.tool()
        async def slow(text: str) -> str:
            self.ran.append(text)
            await self.open.wait()
            return text

        @server.tool()
        async def quick(text: str) -> str:
            self.ran.append(text)
            return text

        return server


def ask(rpc_id: int, tool: str, text: str) -> dict[str, Any]:
    params = {"name": tool, "arguments": {"text": text}}
    return {"jsonrpc": "2.0", "id": rpc_id, "method": "tools/call", "params": params}


def batch(text: str = "") -> list[dict[str, Any]]:
    return [NEWS, ask(1, "quick", f"{text}one"), ask(2, "slow", f"{text}two")]


async def texts(exchange: RawExchange) -> dict[int, str]:
    """The answers of an exchange, by id."""
    if exchange.is_stream:
        await exchange.rest()
        answers = exchange.messages
    else:
        answers = exchange.json()
    assert len({answer["id"] for answer in answers}) == len(answers)
    return {answer["id"]: answer["result"]["structuredContent"]["result"] for answer in answers}


async def is_(tables: Tables, query: str, expected: int) -> bool:
    return bool(await tables.value(query) == expected)


def old() -> RawSession:
    return RawSession(protocol_version="2025-03-26")


@both
async def test_a_batch_that_runs_is_joined(database: str, edge: int) -> None:
    gate = Gate()
    async with cluster(database, gate.server, 2) as nodes, tables_of(database) as tables, old() as session:
        await session.open(nodes[0].url)
        one = await session.post(nodes[0].url, batch())
        await eventually(lambda: sorted(gate.ran) == ["one", "two"], "both run")
        await one.next()
        before = await tables.counts()
        two = await session.post(nodes[edge].url, [batch()[2], NEWS, batch()[1]])  # in any order
        assert two.status == 200, two.body
        await one.rest()
        gate.open.set()
        assert await texts(two) == {1: "one", 2: "two"}
        after = await tables.counts()
        assert (after["requests"], after["streams"]) == (before["requests"], before["streams"])
        assert sorted(gate.ran) == ["one", "two"]


@pytest.mark.parametrize(("response", "edge"), [("sse", 0), ("sse", 1), ("json", 1), ("auto", 1)])
async def test_a_finished_batch_whose_exchange_broke_is_answered_from_the_store(
    database: str, response: str, edge: int
) -> None:
    gate = Gate()
    async with (
        cluster(database, gate.server, 2, response=response) as nodes,
        tables_of(database) as tables,
        old() as session,
    ):
        await session.open(nodes[0].url)
        call = asyncio.create_task(session.post(nodes[1].url, batch()))
        await eventually(lambda: sorted(gate.ran) == ["one", "two"], "both run")
        if response == "json":
            call.cancel()
            await asyncio.wait({call})
        else:
            await (await call).close()
        await eventually(lambda: is_(tables, SINKS, 0), "the exchange is over")
        gate.open.set()
        await eventually(lambda: is_(tables, UNFINISHED, 0), "both are answered")
        before = await tables.counts()
        again = await session.post(nodes[edge].url, batch())
        assert again.status == 200, again.body
        assert await texts(again) == {1: "one", 2: "two"}
        assert await tables.counts() == before
        assert sorted(gate.ran) == ["one", "two"]
        # written to its end: now the ids are free, all of them
        await eventually(lambda: is_(tables, "select count(*) from pgmcp.requests where open", 0), "the ids are free")
        assert await texts(await session.post(nodes[edge].url, batch())) == {1: "one", 2: "two"}
        assert len(gate.ran) == 4


@both
async def test_a_half_answered_batch_keeps_all_of_its_ids(database: str, edge: int) -> None:
    """What one exchange carried as far as it went, and let go in good order, is not written to its end."""
    gate = Gate()
    async with cluster(database, gate.server, 2) as nodes, tables_of(database) as tables, old() as session:
        await session.open(nodes[0].url)
        one = await session.post(nodes[1].url, batch())
        await one.next()
        for open_stream in nodes[1].incarnation.open_streams:
            open_stream.cut = True
            open_stream.moved.set()
        await one.rest()
        assert one.error is None
        await eventually(lambda: is_(tables, SINKS, 0), "it let go")
        two = await session.post(nodes[edge].url, batch())
        assert two.status == 200, two.body
        gate.open.set()
        assert await texts(two) == {1: "one", 2: "two"}
        assert sorted(gate.ran) == ["one", "two"]


@both
async def test_what_shares_requests_with_a_batch_and_is_another_post(database: str, edge: int) -> None:
    gate = Gate()
    async with cluster(database, gate.server, 2) as nodes, tables_of(database) as tables, old() as session:
        await session.open(nodes[0].url)
        one = await session.post(nodes[0].url, batch())
        await one.next()
        await eventually(lambda: sorted(gate.ran) == ["one", "two"], "both run")
        first, second = batch()[1:]
        others: list[object] = [
            [first, second],  # its notification would be lost, or said twice
            [NEWS, NEWS, first, second],
            [first, ask(3, "quick", "three")],
            first,
            second,
            [second],
            [NEWS, first, ask(2, "slow", "other")],
            [NEWS, first, second, ask(3, "quick", "three")],
        ]
        before = await tables.counts()

        async def refused(posts: list[object]) -> None:
            for post in posts:
                answer = await session.post(nodes[edge].url, post)
                assert (answer.status, answer.json()["error"]["code"]) == (400, INVALID_REQUEST), post

        await refused(others)
        assert await tables.counts() == before
        await one.close()
        await eventually(lambda: is_(tables, SINKS, 0), "the exchange is over")
        gate.open.set()
        await eventually(lambda: is_(tables, UNFINISHED, 0), "both are answered")
        before = await tables.counts()
        await refused(others)  # nobody has got the answers, and they must not run again
        assert await tables.counts() == before
        assert sorted(gate.ran) == ["one", "two"]
        # an id may be given to something else, as that of a single request
        other = await session.post(nodes[edge].url, ask(1, "quick", "other"))
        assert await texts(other) == {1: "other"}
        await eventually(lambda: is_(tables, SINKS, 0), "the exchange is over")
        # the batch still has its answers
        assert await texts(await session.post(nodes[edge].url, batch())) == {1: "one", 2: "two"}
        assert sorted(gate.ran) == ["one", "other", "two"]


@both
async def test_a_batch_of_one_and_the_same_request_alone_are_one(database: str, edge: int) -> None:
    gate = Gate()
    async with (
        cluster(database, gate.server, 2, response="json") as nodes,
        tables_of(database) as tables,
        old() as session,
    ):
        await session.open(nodes[0].url)
        alone = json.dumps(ask(1, "slow", "one"), ensure_ascii=False).encode()
        call = asyncio.create_task(session.post(nodes[0].url, alone))
        await eventually(lambda: gate.ran == ["one"], "it runs")
        again = asyncio.create_task(session.post(nodes[edge].url, b"[" + alone + b"]"))
        moved = "select count(*) from pgmcp.streams where kind = 'request' and sink_epoch = 2"
        await eventually(lambda: is_(tables, moved, 1), "it is joined")
        gate.open.set()
        assert await texts(await again) == {1: "one"}
        assert (await call).status == 409
        assert gate.ran == ["one"]


@both
async def test_the_same_batch_at_the_same_moment_runs_once(database: str, edge: int) -> None:
    gate = Gate()
    gate.open.set()
    async with cluster(database, gate.server, 2) as nodes, old() as session:
        await session.open(nodes[0].url)
        for turn in range(10):
            posts = [session.post(nodes[n].url, batch(f"{turn} ")) for n in (0, edge, 1)]
            exchanges = await asyncio.gather(*posts)
            assert [exchange.status for exchange in exchanges] == [200] * 3
            for exchange in exchanges:
                await exchange.rest()
        # who comes after the answers were written runs again, as a single request does
        for turn in range(10):
            ran = [text for text in gate.ran if text.startswith(f"{turn} ")]
            assert len(set(ran)) == 2
            assert ran.count(f"{turn} one") == ran.count(f"{turn} two")
