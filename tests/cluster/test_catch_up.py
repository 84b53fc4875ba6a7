"""What a lost line costs: by what has moved, not by what lives on the node."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from mcp.server.subscriptions import ToolsListChanged

from pgmcp import Cluster
from pgmcp.clock import Ids
from pgmcp.node import catch_up
from pgmcp.node.catch_up import CatchUp
from pgmcp.types import StreamId
from pgmcp.web.open_streams import OpenStreams
from tests.harness.clients import RawExchange, RawSession
from tests.harness.clock import FakeClock, settle
from tests.harness.cluster import RunningNode, cluster, everything, lost_lines, tables_of
from tests.harness.waiting import eventually

MANY = 25
LISTED, UPDATED = "notifications/tools/list_changed", "notifications/resources/updated"


@contextlib.asynccontextmanager
async def listeners(node: RunningNode, count: int) -> AsyncIterator[list[RawExchange]]:
    """Sessions that subscribe and listen."""
    async with contextlib.AsyncExitStack() as stack:
        streams: list[RawExchange] = []
        for _ in range(count):
            session = await stack.enter_async_context(RawSession())
            await session.open(node.url)
            await session.call(node.url, "resources/subscribe", {"uri": "test://watched-resource"})
            streams.append(await session.get(node.url))
        yield streams


@contextlib.contextmanager
def statements(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Count what a node asks PostgreSQL."""
    database, counted = node.database, Counter[str]()
    fetch = database.fetch

    async def counting(name: str, *args: object, **more: Any) -> Any:
        counted[name] += 1
        return await fetch(name, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(database, "fetch", counting)
        yield counted


async def told_of_nothing_else(streams: list[RawExchange], database: str) -> None:
    """What is published next is the next thing that each stream brings."""
    await Cluster(database).publish(ToolsListChanged())
    for stream in streams:
        await stream.message(LISTED)
        assert [message["method"] for message in stream.messages] == [LISTED]


def bounded(counted: Counter[str], readings: int, hurries: float = 0) -> None:
    """A reading takes a few statements, however many sessions live here, and a look in a hurry two."""
    assert not counted["claim"]
    assert counted["unclaimed"] <= readings + hurries
    assert counted["owned"] <= readings
    assert counted["read_streams"] <= 3 * readings + hurries, "grouped"


async def test_a_lost_line_costs_by_what_has_moved(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        cluster(database, everything, 1, poll=60, idle_poll=120) as (node,),
        tables_of(database) as tables,
        listeners(node, MANY) as streams,
    ):
        loop = asyncio.get_running_loop()
        with statements(node, monkeypatch) as counted:
            began = loop.time()
            async with lost_lines([node], tables):
                pass
            down = loop.time() - began
            await eventually(lambda: counted["owned"] and counted["unclaimed"] and counted["read_streams"], "it reads")
            await read_again(node)
            assert not counted["append"], "nobody is told anything"
            await told_of_nothing_else(streams, database)
        bounded(counted, readings=2, hurries=2 * down / catch_up.HURRY_SECONDS)  # jitter may double them


async def read_again(node: RunningNode) -> None:
    node.incarnation.catch_up.begin()
    await eventually(lambda: not node.incarnation.catch_up.wanted, "it reads again")


async def test_a_deaf_node_costs_by_what_has_moved(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line stays down; what it cannot hear it finds by looking."""
    async with (
        cluster(database, everything, 1, poll=0.3) as (node,),
        tables_of(database) as tables,
        listeners(node, MANY) as streams,
    ):
        line = node.incarnation.line

        async def refused(*_: object, **__: object) -> None:
            raise OSError

        with monkeypatch.context() as patch, statements(node, monkeypatch) as counted:
            patch.setattr(node.database, "connect", refused)
            await tables.end_lines()
            await eventually(lambda: not line.up, "the line is down")
            await eventually(lambda: counted["read_streams"] >= 3, "it looks")
            assert not counted["claim"]
            assert not counted["append"]
            assert counted["read_streams"] <= 3 * counted["owned"] + 3, "grouped"
            await told_of_nothing_else(streams, database)


async def test_many_streams_are_read_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catch_up, "STREAMS_TOGETHER", 10)
    clock, open_streams, looks = FakeClock(), OpenStreams(), Mock()
    reading = CatchUp(looks.host, open_streams, looks.publication_reader, looks.takeover, clock, Ids())
    looks.host.drop_strangers = AsyncMock()
    with contextlib.ExitStack() as stack:
        ears = [stack.enter_context(open_streams.subscribe(StreamId(Ids().uuid()))) for _ in range(35)]
        running = asyncio.create_task(reading.run())
        reading.begin()
        await settle()
        assert sum(ear.moved.is_set() for ear in ears) == 10
        await clock.advance(catch_up.SPREAD_SECONDS)
        assert all(ear.moved.is_set() for ear in ears)
        running.cancel()
        await asyncio.wait({running})
