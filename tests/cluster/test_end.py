"""The end of sessions: known everywhere at once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, everything, tables_of
from tests.harness.waiting import eventually

WATCHED = "test://watched-resource"
OF_SESSIONS = ("sessions", "journal", "requests", "streams", "events")
INVALID_REQUEST = -32600


def slow(seconds: float = 60) -> dict[str, Any]:
    return {"name": "slow", "arguments": {"seconds": seconds, "steps": 1000}, "_meta": {"progressToken": 1}}


@pytest.mark.parametrize(("at", "version"), [(0, "2025-11-25"), (1, "2025-11-25"), (2, "2025-03-26")])
async def test_after_delete_every_node_says_404(database: str, at: int, version: str) -> None:
    async with (
        cluster(database, everything, 3) as nodes,
        tables_of(database) as tables,
        RawSession(protocol_version=version) as session,
        RawSession() as stranger,
    ):
        await stranger.open(nodes[0].url)
        await stranger.call(nodes[1].url, "ping")
        kept = await tables.counts()
        await session.open(nodes[0].url)
        await session.call(nodes[1].url, "resources/subscribe", {"uri": WATCHED})
        await session.call(nodes[2].url, "logging/setLevel", {"level": "error"})
        seen = await session.request(nodes[2].url, "ping")
        await seen.rest()
        calls = [await session.request(node.url, "tools/call", slow()) for node in nodes]
        for call in calls:
            await call.message("notifications/progress")
        standalone = await session.get(nodes[(at + 1) % 3].url)
        ended = await session.delete(nodes[at].url)
        assert (ended.status, ended.body) == (200, b"")
        # the very next requests, before any wake-up can have been heard
        for node in (*nodes[at + 1 :], *nodes[: at + 1]):
            gone = [
                await session.request(node.url, "ping"),
                await session.notify(node.url, "notifications/roots/list_changed"),
                await session.get(node.url),
                await session.get(node.url, seen.last_event_id),
                await session.delete(node.url),
            ]
            for exchange in gone:
                assert exchange.status == 404
                assert exchange.json()["error"]["code"] == INVALID_REQUEST
        for stream in (*calls, standalone):
            await stream.rest(timeout=5)
            assert stream.error is None
        assert all("result" not in message for call in calls for message in call.messages)
        await stranger.call(nodes[2].url, "ping")
        left = await tables.counts()
        later = {"requests": 1, "streams": 1, "events": 1}  # the stranger's second ping
        assert left == {name: count + later.get(name, 0) for name, count in kept.items()}
        await eventually(lambda: nodes[0].incarnation.host.sessions == 1, "the actor is gone")


async def test_the_tools_of_an_ended_session_stop(database: str) -> None:
    async with cluster(database, everything, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        call = await session.request(nodes[1].url, "tools/call", slow())
        await call.message("notifications/progress")
        before = _tasks("session ")
        assert before == 1
        await session.delete(nodes[1].url)
        await eventually(lambda: _tasks("session ") == 0, "the server session has ended")


def _tasks(name: str = "") -> int:
    return sum(not task.done() and task.get_name().startswith(name) for task in asyncio.all_tasks())


async def _state(nodes: Sequence[RunningNode], tables: Tables) -> dict[str, int]:
    """What the cluster holds right now."""
    ours = "select count(*) from pg_stat_activity where datname = current_database() and application_name "
    backends, lines = ours + "in ('pgmcp n1', 'pgmcp n2')", ours + "like 'pgmcp n_ line'"
    return {
        "tasks": sum(not task.done() for task in asyncio.all_tasks()),
        "open_streams": sum(len(node.incarnation.open_streams) for node in nodes),
        "actors": sum(node.incarnation.host.sessions for node in nodes),
        "tasks of hosts": sum(node.incarnation.host.under_way for node in nodes),
        "sinks": await tables.value("select count(*) from pgmcp.streams where sink is not null"),
        "lines": await tables.value(lines),
        "too many connections": max(0, await tables.value(backends) - 6 * len(nodes)),
    }


async def _nothing(grown: Awaitable[dict[str, int]]) -> bool:
    return not await grown


async def _use(nodes: Sequence[RunningNode], number: int, *, delete: bool) -> None:
    here, there = nodes[number % 2], nodes[(number // 2) % 2]
    async with RawSession(capabilities={"elicitation": {"form": {}}}) as session:
        await session.open(here.url, there.url)
        await session.get(there.url)
        if number % 4 == 0:
            await session.call_tool(there.url, "count")
        if number % 4 == 1:
            asked = {"name": "test_elicitation", "arguments": {"message": "?"}}
            await (await session.request(there.url, "tools/call", asked)).message("elicitation/create")
        if number % 4 > 1:
            running = await session.request(there.url, "tools/call", slow(600))
            await running.next()
            if number % 4 == 2:
                await running.close()
        if delete:
            assert (await session.delete(here.url)).status == 200


async def _sessions(nodes: Sequence[RunningNode], count: int, *, delete: bool) -> None:
    turns = asyncio.Semaphore(10)

    async def one(number: int) -> None:
        async with turns:
            await _use(nodes, number, delete=delete)

    await asyncio.gather(*(one(number) for number in range(count)))


async def test_nothing_is_left_of_two_hundred_sessions(database: str) -> None:
    async with cluster(database, everything, 2) as nodes, tables_of(database) as tables:
        await _sessions(nodes, 8, delete=True)  # every connection of the pools has been used once
        await eventually(lambda: nodes[0].incarnation.host.sessions + nodes[1].incarnation.host.sessions == 0, "quiet")
        rows, before = await tables.counts(), await _state(nodes, tables)
        assert {name: rows[name] for name in OF_SESSIONS} == dict.fromkeys(OF_SESSIONS, 0)
        await _sessions(nodes, 200, delete=True)

        async def grown() -> dict[str, int]:
            return {name: now for name, now in (await _state(nodes, tables)).items() if now > before[name]}

        await eventually(lambda: _nothing(grown()), f"nothing is more than before: {before}")
        assert await tables.counts() == rows
        for node in nodes:
            assert node.incarnation.wakeups.waiting == 0
        gc.collect()
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("session ")]


async def test_clients_that_just_go_leave_no_stream_behind(database: str) -> None:
    count = 24
    async with cluster(database, everything, 2) as nodes, tables_of(database) as tables:
        await _sessions(nodes, count, delete=False)

        async def released() -> bool:
            state = await _state(nodes, tables)
            return state["open_streams"] == 0 and state["sinks"] == 0 and state["tasks of hosts"] == 0

        await eventually(released, "streams are released")
        assert (await _state(nodes, tables))["actors"] == count
        watchers = [task for task in asyncio.all_tasks() if "_Watch" in repr(task.get_coro())]
        assert watchers == []


@pytest.mark.parametrize("at", [0, 1])
async def test_a_handshake_that_fails_leaves_nothing(database: str, at: int) -> None:
    async with cluster(database, everything, 2) as nodes, tables_of(database) as tables, RawSession() as session:
        before = await tables.counts()
        refused = await session.post(nodes[at].url, {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {}})
        assert refused.status == 400
        assert await tables.counts() == before
        await eventually(lambda: nodes[at].incarnation.host.sessions == 0, "the actor is gone")
        assert len(nodes[at].incarnation.open_streams) == 0
