"""``subscriptions/listen`` over three nodes: what is published anywhere reaches the streams of every node."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

from mcp.server import Server
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    ListenHandler,
    PromptsListChanged,
    ResourceUpdated,
    ToolsListChanged,
)

from pgmcp import Cluster
from tests.cluster.test_publications import FENCE, LISTS, UPDATED, three
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import cluster, everything, lost_lines
from tests.harness.modern import Modern
from tests.harness.waiting import eventually

LISTEN, ACKNOWLEDGED = "subscriptions/listen", "notifications/subscriptions/acknowledged"
SUBSCRIPTION = "io.modelcontextprotocol/subscriptionId"
EVERYTHING = {"toolsListChanged": True, "promptsListChanged": True, "resourcesListChanged": True}


class Stream:
    """A stream, and what came on it."""

    def __init__(self, exchange: RawExchange) -> None:
        self.exchange = exchange
        self.id = json.loads(exchange.request_body)["id"]

    def told(self) -> list[str]:
        """What came, as methods and uris; each names its subscription."""
        first, *told = self.exchange.messages
        assert first["method"] == ACKNOWLEDGED
        assert all(message["params"]["_meta"][SUBSCRIPTION] == self.id for message in told)
        return [message["params"].get("uri") or message["method"] for message in told]

    async def until(self, *wanted: str) -> list[str]:
        """What came until each of these had come."""
        while not set(wanted) <= set(self.told()):
            await self.exchange.next(10)
        return self.told()


@contextlib.asynccontextmanager
async def listening(base: str, *uris: str, **lists: bool) -> AsyncIterator[Stream]:
    async with Modern() as client:
        wanted = {**lists, "resourceSubscriptions": [*uris, FENCE]}
        exchange = await client.request(base, LISTEN, {"notifications": wanted})
        await exchange.message(ACKNOWLEDGED)
        yield Stream(exchange)


async def test_streams_of_all_nodes_hear_what_is_published_anywhere(database: str) -> None:
    async with three(database) as (nodes, tables), contextlib.AsyncExitStack() as stack, Modern() as client:
        wanted = ["a://0", "a://1", "a://2", "a://script", "a://sql"]
        full = [await stack.enter_async_context(listening(node.url, *wanted, **EVERYTHING)) for node in nodes]
        narrow = [await stack.enter_async_context(listening(node.url, "a://1")) for node in nodes]
        for number, node in enumerate(nodes):
            await client.result(node.url, "publish", what="", uris=[f"a://{number}", "a://of-nobody"])
        script = Cluster(database)
        await script.publish(ToolsListChanged(), ResourceUpdated(uri="a://script"))
        await tables.value("select pgmcp.publish_prompts_list_changed()")
        await tables.value("select pgmcp.publish_resources_list_changed()")
        await tables.value("select pgmcp.publish_resource_updated('a://sql')")
        await script.publish(ResourceUpdated(uri=FENCE))
        methods = [method for _, method in LISTS.values()]
        for stream in full:
            assert sorted(await stream.until(FENCE)) == sorted([*wanted, *methods, FENCE])
        for stream in narrow:
            assert await stream.until(FENCE) == ["a://1", FENCE]


async def test_one_call_tells_both_eras(database: str) -> None:
    """A tool call of either era, on a third node."""
    async with cluster(database, everything, 3) as nodes, RawSession() as session, Modern() as client:
        watched = "test://watched-resource"
        await session.open(nodes[0].url)
        await session.call(nodes[0].url, "resources/subscribe", {"uri": watched})
        old = await session.get(nodes[0].url)
        async with listening(nodes[1].url, watched, toolsListChanged=True) as new:
            await client.result(nodes[2].url, "touch_watched_resource", text="modern")
            await old.message(UPDATED)
            await new.exchange.message(UPDATED)
            await session.call_tool(nodes[2].url, "touch_watched_resource", text="with a session")
            await old.message(UPDATED)
            await new.exchange.message(UPDATED)
            await client.result(nodes[2].url, "test_trigger_tool_change")  # it announces two changes
            await old.message(LISTS["tools"][1])  # what waits for this one counts once
            for _ in range(2):
                await new.exchange.message(LISTS["tools"][1])


async def test_after_a_lost_line_a_stream_is_told_once_what_was_published_meanwhile(database: str) -> None:
    async with three(database, poll=60) as (nodes, tables), contextlib.AsyncExitStack() as stack:
        full = [await stack.enter_async_context(listening(node.url, "a://1", **EVERYTHING)) for node in nodes]
        narrow = [await stack.enter_async_context(listening(node.url, "a://1")) for node in nodes]
        async with lost_lines(nodes, tables):
            await Cluster(database).publish(ResourceUpdated(uri="a://1"))
        await Cluster(database).publish(ResourceUpdated(uri=FENCE))
        for stream in full + narrow:
            assert await stream.until(FENCE) == ["a://1", FENCE]


async def test_streams_outlive_an_incarnation_and_are_told_what_they_missed(database: str) -> None:
    async with three(database, renew=0.1) as (nodes, tables), listening(nodes[0].url, "a://1") as stream:
        before = nodes[0].incarnation
        await tables.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", before.node_id)
        await Cluster(database).publish(ResourceUpdated(uri="a://1"))
        await eventually(lambda: nodes[0].present not in (None, before), "it has joined again")
        assert {"a://1", FENCE} == set(await stream.until("a://1", FENCE))


async def test_a_low_level_server_of_the_sdk(database: str) -> None:
    """Its author holds the bus, as the SDK's own documentation says."""
    buses = [InMemorySubscriptionBus() for _ in range(2)]
    servers = iter([Server("low", on_subscriptions_listen=ListenHandler(bus)) for bus in buses])
    async with (
        cluster(database, lambda: next(servers), 2) as nodes,
        listening(nodes[0].url, promptsListChanged=True) as stream,
    ):
        await buses[1].publish(PromptsListChanged())
        await buses[0].publish(ResourceUpdated(uri=FENCE))
        assert await stream.until(FENCE) == [LISTS["prompts"][1], FENCE]
