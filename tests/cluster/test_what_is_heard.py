"""What wake-ups and views tell: nothing in them resumes or addresses anything over HTTP (G8)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import httpx
from mcp.server.subscriptions import ToolsListChanged

from pgmcp import Cluster
from pgmcp.store.notifier import channel
from pgmcp.store.schema.public_views import COLUMNS
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, cluster, everything, tables_of
from tests.harness.waiting import eventually

COUNT: dict[str, Any] = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "test_simple_text"}}


class Sse:
    """One HTTP+SSE client."""

    def __init__(self) -> None:
        self.http = httpx.AsyncClient(timeout=httpx.Timeout(10, read=None), trust_env=False)

    async def get(self, base: str, last: str | None = None) -> tuple[RawExchange, str]:
        """The stream, and where its messages go."""
        headers = {"accept": "text/event-stream"} | ({"last-event-id": last} if last else {})
        request = self.http.build_request("GET", f"{base}/sse", headers=headers)
        stream = await RawExchange(await self.http.send(request, stream=True)).begin()
        endpoint = await stream.next()
        assert endpoint is not None
        stream.seen.clear()
        return stream, str(endpoint.data)

    async def post(self, url: str, message: dict[str, Any]) -> int:
        return (await self.http.post(url, json=message)).status_code

    async def call(self, base: str, where: str, stream: RawExchange) -> None:
        info = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "sse", "version": "1"}}
        first: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": info}
        for message in (first, {"jsonrpc": "2.0", "method": "notifications/initialized"}, COUNT):
            assert await self.post(base + where, message) == 202
            if "id" in message:
                await stream.response(message["id"])


@contextlib.asynccontextmanager
async def listening(database: str, nodes: Sequence[RunningNode]) -> AsyncIterator[list[str]]:
    """Every payload on every channel of the cluster."""
    heard: list[str] = []
    hand = await asyncpg.connect(database)
    try:
        for node in (None, *(node.incarnation.node_id for node in nodes)):
            await hand.add_listener(channel("pgmcp", node), lambda *said: heard.append(str(said[-1])))
        yield heard
    finally:
        await hand.close()


async def test_nothing_that_is_said_or_shown_leads_to_a_session(database: str) -> None:
    async with (
        cluster(database, everything, 2) as nodes,
        tables_of(database) as tables,
        listening(database, nodes) as heard,
        RawSession() as session,
        RawSession() as ends,
    ):
        one, two = (node.url for node in nodes)
        await ends.open(one)
        await session.open(one)
        standalone = await session.get(two)
        await session.call(two, "resources/subscribe", {"uri": "test://watched-resource"})
        await (await session.request(two, "tools/call", COUNT["params"])).rest()
        sse = Sse()
        stream, where = await sse.get(two)
        await sse.call(one, where, stream)
        await Cluster(database).publish(ToolsListChanged())
        await standalone.message("notifications/tools/list_changed")
        await stream.message("notifications/tools/list_changed")
        moved = next(iter(nodes[0].actors))
        await nodes[0].incarnation.host.hand_over(moved, nodes[1].incarnation.node_id, busy=False)
        assert (await ends.delete(two)).status == 200
        await eventually(lambda: {payload[0] for payload in heard} >= set("itep"), f"all of it was said: {heard}")

        shown = [
            str(tuple(row)) for view in COLUMNS for row in await tables.rows(f"select v::text from pgmcp.{view} v")
        ]
        told = "\n".join([*heard, *shown])
        for row in await tables.rows("select id from pgmcp.streams"):
            assert row["id"].hex not in told
            assert str(row["id"]) not in told
        assert session.session_id
        assert session.session_id not in "\n".join(heard)
        _, _, session_id = where.partition("session_id=")
        assert session_id not in told
        assert "takeover" not in told
        await nothing_comes_of(
            {word[1:] for said in heard for word in said.split(",") if word[0] in "st"}, where, sse, session, two
        )
        shown_as = await tables.value("select session_id from pgmcp.live_sessions where transport = 'sse'")
        assert shown_as.rpartition("-")[0] == session_id.rpartition("-")[0]
        assert await sse.post(one + where.replace(session_id, shown_as), COUNT) == 404
        assert await sse.post(one + where, {"jsonrpc": "2.0", "id": 9, "method": "ping"}) == 202
        await stream.response(9)
        await sse.http.aclose()


async def nothing_comes_of(words: set[str], where: str, sse: Sse, session: RawSession, node: str) -> None:
    """Whoever has heard all of it resumes no stream, not even with the session ids that the views show."""
    assert len(words) >= 3
    for word in words:
        another, elsewhere = await sse.get(node, f"{word}.0")
        assert elsewhere != where, "a stream was resumed"
        await another.close()
        assert (await session.get(node, f"{word}.0")).status in {204, 404}, "a stream was resumed"
