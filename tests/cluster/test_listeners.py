"""Two listeners of one session: the newest wins, and nobody displaces others for ever."""

from __future__ import annotations

import json

from pgmcp.types import REPLACEMENTS
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything, tables_of
from tests.harness.waiting import eventually

WATCHED, UPDATED = "test://watched-resource", "notifications/resources/updated"
RELEASED = "select sink is null from pgmcp.streams where kind = 'standalone'"


async def test_listeners_that_displace_each_other(database: str) -> None:
    """Over both nodes; each comes back as clients do, with the last event id that it has."""
    async with (
        cluster(database, everything, 2) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        await session.call(nodes[0].url, "resources/subscribe", {"uri": WATCHED})
        listening = await session.get(nodes[0].url)
        await listening.next()
        for turn in range(1, REPLACEMENTS + 1):
            displaced, listening = listening, await session.get(nodes[turn % 2].url, listening.last_event_id)
            assert listening.status == 200
            await listening.next()
            await displaced.rest()
            assert displaced.error is None, "it ends with the final chunk"
        for node in nodes:
            for last in (None, listening.last_event_id):
                refused = await session.get(node.url, last)
                assert refused.status == 409
                assert "one connection" in json.loads(refused.body)["error"]["message"]
        await session.call_tool(nodes[0].url, "touch_watched_resource", text="x")
        await listening.message(UPDATED)
        # a connection that has ended is no listener: whoever comes back after it replaces nobody
        for turn in range(2 * REPLACEMENTS):
            await listening.close()
            await eventually(lambda: tables.value(RELEASED), "the stream is free")
            listening = await session.get(nodes[turn % 2].url, listening.last_event_id)
            assert listening.status == 200
            await listening.next()
        # the window passes
        await tables.execute(
            "update pgmcp.streams set replaced_at = "
            "(select array_agg(at - interval '10 s') from unnest(replaced_at) at)"
        )
        assert (await session.get(nodes[0].url)).status == 200


async def test_the_resume_of_a_requests_stream_always_replaces(database: str) -> None:
    """A client behind a network that breaks silently comes back as often as it must."""
    async with cluster(database, everything, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        slow = {"name": "slow", "arguments": {"seconds": 1, "steps": 50}, "_meta": {"progressToken": 1}}
        call = await session.request(nodes[1].url, "tools/call", slow, request_id=5)
        await call.message("notifications/progress")
        for turn in range(2 * REPLACEMENTS):
            call = await session.get(nodes[turn % 2].url, call.last_event_id)
            assert call.status == 200
            await call.next()
        assert "result" in await call.response(5)
