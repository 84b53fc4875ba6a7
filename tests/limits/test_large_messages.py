"""Large messages arrive over any node and hold nobody up; what is too large is an error, at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from pgmcp.session.adapter import Kind, Outgoing
from pgmcp.session.message_limit import MessageLimit
from pgmcp.types import Cursor
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

MIB = 1 << 20
HANGS = 20.0
"""Seconds after which a neighbour's call hangs: how quick it is, is measured elsewhere."""


async def calls_until(done: asyncio.Task[Any], neighbour: RawSession, url: str) -> list[float]:
    """Call again and again while something else goes on; how long each call took."""
    took, loop = [], asyncio.get_running_loop()
    while not done.done():
        start = loop.time()
        assert (await neighbour.call(url, "ping", timeout=HANGS))["result"] == {}
        took.append(loop.time() - start)
    return took


@pytest.mark.parametrize(("size", "response"), [(1, "sse"), (16, "json"), (60, "sse")])
async def test_a_large_answer_over_another_node(
    database: str, talker: Talker, size: int, response: str, record_property: Callable[[str, object], None]
) -> None:
    async with (
        cluster(database, talker, 2, response=response, statement_timeout=2) as nodes,
        RawSession() as session,
        RawSession() as neighbour,
    ):
        await session.open(nodes[0].url)
        await neighbour.open(nodes[0].url)

        async def whole() -> int:
            arguments = {"size": size * MIB - 1000}
            exchange = await session.request(
                nodes[1].url, "tools/call", {"name": "whole", "arguments": arguments}, request_id=7
            )
            return len((await exchange.response(7, 90))["result"]["content"][0]["text"])

        calling = asyncio.create_task(whole())
        took = await calls_until(calling, neighbour, nodes[1].url)
        assert calling.result() == size * MIB - 1000
        record_property("slowest neighbour", max(took))
        print(f"{size} MiB: {len(took)} calls of the neighbour, the slowest {max(took):.3f} s")


@pytest.mark.parametrize("response", ["sse", "json"])
async def test_an_answer_that_is_too_large(database: str, talker: Talker, response: str) -> None:
    limit = 256 * 1024
    async with cluster(database, talker, 2, response=response, max_message=limit) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        params: dict[str, Any] = {"name": "whole", "arguments": {"size": limit}}
        error = (await session.call(nodes[1].url, "tools/call", params))["error"]
        assert error["code"] == -32603
        assert error["data"]["reason"] == "too_large"
        assert error["data"]["limit"] == limit < error["data"]["bytes"] < limit + 200
        assert "--max-message" in error["message"]
        params["arguments"]["size"] = limit - 200
        assert "result" in await session.call(nodes[1].url, "tools/call", params)


async def test_a_notification_that_is_too_large_is_its_senders_error(
    database: str, talker: Talker, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 256 * 1024
    async with (
        cluster(database, talker, 2, max_message=limit) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        params: dict[str, Any] = {"name": "flood", "arguments": {"count": 1, "size": limit}}
        result = (await session.call(nodes[1].url, "tools/call", params))["result"]
        assert result["isError"]
        assert "--max-message" in caplog.text
        assert await tables.value("select max(octet_length(message)) from pgmcp.events") < limit
        params["arguments"]["size"] = 10
        assert not (await session.call(nodes[1].url, "tools/call", params))["result"].get("isError")


async def test_a_large_event_that_another_reader_takes_ends_abruptly(database: str, talker: Talker) -> None:
    """Nobody takes half of it for all: the new reader gets it whole, the old one none of it."""
    async with (
        cluster(database, talker, 2, write_timeout=20) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        log = nodes[1].incarnation.log
        read_on, reading, go_on = log.read_on, asyncio.Event(), asyncio.Event()

        async def late(cursor: Cursor, start: int) -> bytes | None:
            reading.set()
            await go_on.wait()
            return await read_on(cursor, start)

        log.read_on = late  # type: ignore[method-assign]  # it takes its time
        params = {"name": "whole", "arguments": {"size": 3 * MIB}}
        call = await session.request(nodes[1].url, "tools/call", params, request_id=9)
        assert (await call.event()).is_priming
        async with asyncio.timeout(20):
            await reading.wait()
        resumed = await session.get(nodes[0].url, call.last_event_id)
        assert len((await resumed.response(9, 20))["result"]["content"][0]["text"]) == 3 * MIB
        go_on.set()
        await call.rest()
        assert call.error is not None
        assert call.messages == []
        sinks = "select count(*) from pgmcp.streams where sink is not null"
        await eventually(lambda: zero(tables, sinks), "nobody carries it")


async def zero(tables: Tables, query: str) -> bool:
    return bool(await tables.value(query) == 0)


def test_a_refused_answer_is_small() -> None:
    given = Outgoing(Kind.RESULT, b"x" * 100_000, '"an id"')
    found = MessageLimit(65_536).fitting(given)
    assert json.loads(found.message)["id"] == "an id"
    assert found.kind is Kind.ERROR
    assert len(found.message) < 500
