"""A POST that is held up while its client repeats it elsewhere, and has the answer, runs no second time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from pgmcp.clock import Clock
from pgmcp.web.connection import Connection
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, running_node, serving
from tests.harness.proxy import proxied
from tests.harness.waiting import eventually
from tests.outages.ledger import CALL, Ledger

RUN = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "run", "arguments": {"text": "once"}}}
FREED = "select count(*) from pgmcp.requests where rpc_id = '7' and finished_at is not null and not open"
BLOCKED = 0.5


async def test_a_post_that_its_node_held_runs_no_second_time(database: str, ledger: Ledger, tables: Tables) -> None:
    """The node was cut off from PostgreSQL; its client hung up, repeated the POST elsewhere, and has the answer."""
    async with (
        running_node(database, ledger.server(), "near", Clock()) as near,
        proxied(database) as (proxy, way),
        running_node(way, ledger.server(), "far", Clock(), statement_timeout=0.5) as far,
        RawSession() as session,
    ):
        await session.open(near.url)
        inbox = far.incarnation.inbox
        proxy.black_hole = True
        given_up = asyncio.create_task(session.post(far.url, RUN))
        await eventually(lambda: inbox.accepting, "the far node holds the POST")
        given_up.cancel()
        exchange = await session.post(near.url, RUN)
        await exchange.response(7, CALL)
        await exchange.rest()
        await eventually(lambda: tables.value(FREED), "the answer was noted as written")
        proxy.black_hole = False
        proxy.cut_all()
        await eventually(lambda: not inbox.accepting, "the far node has sent what it held", 20)
        await session.call_tool(far.url, "run", text="after")
        assert ledger.ran == ["once", "after"]


async def test_what_a_node_holds_when_it_stops_is_asked_for_again(database: str, ledger: Ledger) -> None:
    """The HTTP server waits for no exchange for ever; what it says of those that it cuts is 500."""
    async with running_node(database, ledger.server(), "near", Clock()) as near, RawSession() as session:
        await session.open(near.url)
        async with (
            proxied(database) as (proxy, way),
            running_node(way, ledger.server(), "far", Clock(), statement_timeout=0.5) as far,
        ):
            inbox = far.incarnation.inbox
            proxy.black_hole = True
            held = asyncio.create_task(session.post(far.url, RUN))
            await eventually(lambda: inbox.accepting, "the far node holds the POST")
        exchange = await held
        assert (exchange.status, exchange.headers["retry-after"]) == (503, "1")
        assert exchange.json()["error"]["message"] == "This node has stopped; send the same message again."


async def test_what_was_sent_to_a_frozen_node_came_before_it_thawed() -> None:
    """The kernel took it, and knows when."""
    told: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        await receive()
        told.append(Connection(receive, send, 1).silent)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serving(app) as url, httpx.AsyncClient(trust_env=False, verify=False) as client:
        assert (await client.post(url, content=b"1")).status_code == 204
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n1")  # goes to the kernel at once
        time.sleep(BLOCKED)  # noqa: ASYNC251 - nobody here reads it meanwhile
        assert b"204" in await reader.readline()
        writer.close()
    assert told[0] < BLOCKED / 2
    assert BLOCKED - 0.05 < told[1] < BLOCKED + 1


async def _lifespan(receive: Any, send: Any) -> None:
    for _ in range(2):
        await send({"type": (await receive())["type"] + ".complete"})
