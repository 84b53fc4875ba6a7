"""Two hundred sessions at once over three nodes: no error, and nothing is left of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import pytest

from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, cluster, everything, tables_of
from tests.harness.waiting import eventually

COUNT = 200
OF_SESSIONS = ("sessions", "journal", "requests", "streams", "events")
WATCHED = "test://watched-resource"


def held(nodes: Sequence[RunningNode]) -> dict[str, int]:
    """What the nodes hold in memory."""
    parts = [node.incarnation for node in nodes]
    return {
        "open_streams": sum(len(part.open_streams) for part in parts),
        "residents": sum(part.host.sessions for part in parts),
        "tasks of hosts": sum(part.host.under_way for part in parts),
        "early wake-ups": sum(part.wakeups.waiting for part in parts),
        "closing events": sum(part.log.closing for part in parts),
        "unheard claims": sum(part.inbox.unheard for part in parts),
        "session tasks": sum(task.get_name().startswith("session ") for task in asyncio.all_tasks()),
    }


async def life(nodes: Sequence[RunningNode], number: int, meeting: asyncio.Barrier) -> None:
    """One session that lives while all others do, with calls of each kind at each node."""
    here, there, third = (nodes[(number + step) % 3].url for step in range(3))
    async with RawSession(capabilities={"elicitation": {"form": {}}}) as session:
        await session.open(here, there)
        await meeting.wait()
        match number % 5:
            case 0:
                for expected in (1, 2):
                    counted = await session.call_tool(there, "count", 30)
                    assert counted["content"][0]["text"] == str(expected)
            case 1:
                tool = {"name": "test_elicitation", "arguments": {"message": str(number)}}
                asking = await session.request(there, "tools/call", tool, request_id="q")
                question = await asking.message("elicitation/create", 30)
                assert question["params"]["message"] == str(number)
                await session.answer(third, question, {"action": "decline"})
                assert "decline" in str(await asking.response("q", 30))
            case 2:
                assert "result" in await session.call(there, "tools/list", timeout=30)
                uri = f"test://template/{number}/data"
                read = await session.call(third, "resources/read", {"uri": uri}, timeout=30)
                assert f"Data for ID: {number}" in str(read)
            case 3:
                listening = await session.get(third)
                await session.call(there, "resources/subscribe", {"uri": WATCHED}, timeout=30)
                await session.call_tool(there, "touch_watched_resource", 30, text=str(number))
                await listening.message("notifications/resources/updated", 30)
            case _:
                slow = {"name": "slow", "arguments": {"seconds": 60, "steps": 60000}, "_meta": {"progressToken": 1}}
                running = await session.request(there, "tools/call", slow, request_id="s")
                await running.message("notifications/progress", 30)
                await session.notify(third, "notifications/cancelled", {"requestId": "s"})
                assert (await running.response("s", 30))["error"]["code"] == -32800
        assert (await session.delete(third)).status == 200


async def test_two_hundred_sessions_at_once(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(database, everything, 3, pool_size=4) as nodes, tables_of(database) as tables:
        alone = asyncio.Barrier(1)
        for number in range(5):
            await life(nodes, number, alone)
        await eventually(lambda: not any(held(nodes).values()), "quiet")
        rows, tasks = await tables.counts(), len(asyncio.all_tasks())
        assert {name: rows[name] for name in OF_SESSIONS} == dict.fromkeys(OF_SESSIONS, 0)
        meeting = asyncio.Barrier(COUNT)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(COUNT):
                group.create_task(life(nodes, number, meeting))
        try:
            await eventually(lambda: not any(held(nodes).values()), "nothing is held", 20)
        except AssertionError as error:
            raise AssertionError(held(nodes)) from error
        assert await tables.counts() | {"publications": 0} == rows | {"publications": 0}  # they are kept for a while
        gc.collect()
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks, "no more tasks than before")
        ours = "datname = current_database() and application_name ~ '^pgmcp n[123]$'"
        backends = f"select count(*) <= 12 from pg_stat_activity where {ours}"
        await eventually(lambda: tables.value(backends), "no more connections than the pools may have")
    worse = [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}]
    assert worse == []
