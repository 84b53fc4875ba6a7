"""One call of a server's author, a script or SQL reaches every listener of every node, in every era.

``subscriptions/listen`` streams are stood for by what they are made of, listeners of the node's bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import pytest
from mcp.server import Server
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    ListenHandler,
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
)
from mcp_types import EmptyResult, SubscribeRequestParams, UnsubscribeRequestParams

from pgmcp import Cluster, PostgresSubscriptionBus
from pgmcp.clock import Clock
from pgmcp.cluster.lease import LeaseState
from pgmcp.errors import DatabaseUnavailable, PublicationRefused, SchemaError
from pgmcp.store.schema import migrations
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, lost_lines, running_node, tables_of
from tests.harness.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning")

UPDATED = "notifications/resources/updated"
LISTS = {
    "tools": (ToolsListChanged(), "notifications/tools/list_changed"),
    "prompts": (PromptsListChanged(), "notifications/prompts/list_changed"),
    "resources": (ResourcesListChanged(), "notifications/resources/list_changed"),
}
FENCE = "test://fence"


def server() -> MCPServer:
    """A server that publishes what its callers say, and takes subscriptions."""
    made = MCPServer("publisher")

    @made.tool()
    async def publish(what: str, uris: list[str], ctx: Context) -> None:
        """Publish."""
        match what:
            case "tools":
                await ctx.notify_tools_changed()
            case "prompts":
                await ctx.notify_prompts_changed()
            case "resources":
                await ctx.notify_resources_changed()
        for uri in uris:
            await ctx.notify_resource_updated(uri)

    async def taken(*_: object) -> EmptyResult:
        return EmptyResult()

    lowlevel: Any = made._lowlevel_server
    lowlevel.add_request_handler("resources/subscribe", SubscribeRequestParams, taken)
    lowlevel.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, taken)
    return made


class Ear:
    """Somebody who listens to a node's bus, and what they heard."""

    def __init__(self, node: RunningNode) -> None:
        self.heard: list[ServerEvent] = []
        self.leave = node.bus.subscribe(self.heard.append)

    def uris(self) -> list[str]:
        return [event.uri for event in self.heard if isinstance(event, ResourceUpdated)]


class Reader:
    """A session of 2025-11-25 that fetches what is said to it on its standalone stream."""

    def __init__(self, session: RawSession, stream: RawExchange) -> None:
        self.session, self.stream = session, stream

    async def until(self, uri: str, seconds: float = 10) -> list[str]:
        """What came up to an update of a resource, as methods and uris."""
        while not self.stream.messages or self.stream.messages[-1].get("params", {}).get("uri") != uri:
            await self.stream.next(seconds)
        return self.told()

    def told(self) -> list[str]:
        return [message.get("params", {}).get("uri") or message["method"] for message in self.stream.messages]


@contextlib.asynccontextmanager
async def reader(owner: RunningNode, edge: RunningNode, uris: Sequence[str]) -> AsyncIterator[Reader]:
    async with RawSession() as session:
        await session.open(owner.url)
        for uri in (*uris, FENCE):
            await session.call(edge.url, "resources/subscribe", {"uri": uri})
        yield Reader(session, await session.get(edge.url))


@contextlib.asynccontextmanager
async def three(database: str, **settings: Any) -> AsyncIterator[tuple[list[RunningNode], Tables]]:
    async with cluster(database, server, 3, **settings) as nodes, tables_of(database) as tables:
        yield list(nodes), tables


async def sql(tables: Tables, function: str, *args: object) -> None:
    await tables.value(f"select pgmcp.{function}", *args)


async def publish(session: RawSession, node: RunningNode, *uris: str, what: str = "") -> None:
    await session.call_tool(node.url, "publish", what=what, uris=list(uris))


async def nothing() -> None:
    return None


async def quiet(ears: Sequence[Ear], publisher: Cluster) -> None:
    """Until all that was published before is told."""
    await publisher.publish(ResourceUpdated(uri=FENCE))
    await eventually(lambda: all(FENCE in ear.uris() for ear in ears), "the fence is heard")


async def test_a_publish_anywhere_reaches_everybody_once(database: str) -> None:
    async with three(database, poll=60) as (nodes, tables), contextlib.AsyncExitStack() as stack:
        ears = [Ear(node) for node in nodes]
        wanted = ["a://tool-0", "a://tool-1", "a://tool-2", "a://script", "a://sql"]
        readers = [
            await stack.enter_async_context(reader(nodes[n], nodes[(n + 1) % 3], [*wanted, "a://nothing"]))
            for n in range(3)
        ]
        for number, node in enumerate(nodes):
            await publish(readers[number].session, node, f"a://tool-{number}", "a://of-nobody")
        script = Cluster(database)
        await script.publish(ResourceUpdated(uri="a://script"), ToolsListChanged())
        await sql(tables, "publish_resource_updated($1)", "a://sql")
        await sql(tables, "publish_prompts_list_changed()")
        await sql(tables, "publish_resources_list_changed()")
        await quiet(ears, script)
        for ear in ears:
            assert sorted(ear.uris()) == sorted([*wanted, *["a://of-nobody"] * 3, FENCE])
            assert [event for event in ear.heard if not isinstance(event, ResourceUpdated)] == [
                ToolsListChanged(), PromptsListChanged(), ResourcesListChanged()
            ]  # fmt: skip
        for each in readers:
            told = await each.until(FENCE)
            assert sorted(told) == sorted([*wanted, FENCE, *(method for _, method in LISTS.values())])


async def test_none_is_lost_and_none_comes_twice(database: str) -> None:
    """``benchmarks/publications.py`` does it 10,000 times."""
    async with three(database, poll=60) as (nodes, tables):
        ears = [Ear(node) for node in nodes]
        buses = [node.bus for node in nodes]

        async def say(number: int) -> None:
            for turn in range(50):
                uri = f"a://{number}/{turn}"
                if number % 4 < 3:
                    await buses[number % 4].publish(ResourceUpdated(uri=uri))
                else:
                    await sql(tables, "publish_resource_updated($1)", uri)

        await asyncio.gather(*(say(number) for number in range(12)))
        await quiet(ears, Cluster(database))
        expected = sorted([*(f"a://{number}/{turn}" for number in range(12) for turn in range(50)), FENCE])
        for ear in ears:
            assert sorted(ear.uris()) == expected
            assert len(ear.heard) == len(expected), "no invalidation"


@pytest.mark.parametrize("what", LISTS)
async def test_list_changes_by_a_tool_and_by_sql(database: str, what: str) -> None:
    event, method = LISTS[what]
    async with three(database) as (nodes, tables), reader(nodes[0], nodes[1], []) as session:
        ears = [Ear(node) for node in nodes]
        await publish(session.session, nodes[2], what=what)
        await eventually(lambda: all(ear.heard == [event] for ear in ears), "the tool's")
        await session.stream.message(method)
        await sql(tables, f"publish_{what}_list_changed()")
        await eventually(lambda: all(ear.heard == [event, event] for ear in ears), "SQL's")
        await session.stream.message(method)
        assert session.told() == [method, method]


async def test_what_is_rolled_back_is_never_heard_and_what_is_committed_late_is(database: str) -> None:
    async with three(database) as (nodes, _):
        ears = [Ear(node) for node in nodes]
        hand, other = await asyncpg.connect(database), await asyncpg.connect(database)
        late, undone = hand.transaction(), other.transaction()
        await late.start()
        await undone.start()
        await hand.execute("select pgmcp.publish_resource_updated('a://late')")
        await other.execute("select pgmcp.publish_resource_updated('a://undone')")
        async with hand.transaction():  # a savepoint
            await hand.execute("select pgmcp.publish_resource_updated('a://nested')")
        await undone.rollback()
        script = Cluster(database)
        for number in range(20):  # they commit before the older one does
            await script.publish(ResourceUpdated(uri=f"a://{number}"))
        await quiet(ears, script)
        assert all("a://late" not in ear.uris() for ear in ears)
        await late.commit()
        await eventually(lambda: all("a://nested" in ear.uris() for ear in ears), "it is heard")
        expected = [*(f"a://{number}" for number in range(20)), FENCE, "a://late", "a://nested"]
        assert [ear.uris() for ear in ears] == [expected] * 3
        await hand.close()
        await other.close()


async def test_only_who_subscribed_is_told_and_only_after_the_handshake(database: str) -> None:
    async with three(database) as (nodes, _), reader(nodes[0], nodes[1], ["a://1"]) as session:
        script = Cluster(database)
        async with RawSession() as young:
            await young.initialize(nodes[0].url)
            await session.session.call(nodes[2].url, "resources/unsubscribe", {"uri": "a://1"})
            await script.publish(ResourceUpdated(uri="a://1"), ToolsListChanged())
            await script.publish(ResourceUpdated(uri=FENCE))
            assert await session.until(FENCE) == [LISTS["tools"][1], FENCE]
            await young.notify(nodes[1].url, "notifications/initialized")
            await young.call(nodes[0].url, "resources/subscribe", {"uri": FENCE})
            await script.publish(ResourceUpdated(uri=FENCE))
            assert await Reader(young, await young.get(nodes[0].url)).until(FENCE) == [FENCE]


async def test_what_waits_for_a_listener_counts_once(database: str) -> None:
    async with three(database) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        for uri in ("a://1", FENCE):
            await session.call(nodes[0].url, "resources/subscribe", {"uri": uri})
        script = Cluster(database)
        for _ in range(5):
            await script.publish(ResourceUpdated(uri="a://1"), ToolsListChanged())
        await script.publish(ResourceUpdated(uri=FENCE))
        waiting = "select count(*) from pgmcp.events e where e.topic like '%test://fence%'"
        await eventually(lambda: tables.value(waiting), "the fence waits")
        told = await Reader(session, await session.get(nodes[1].url)).until(FENCE)
        assert sorted(told) == sorted([LISTS["tools"][1], "a://1", FENCE])


async def test_what_woke_nobody_is_found_by_the_poll(database: str) -> None:
    """Its publisher died between the two."""
    async with three(database, poll=0.2) as (nodes, tables), reader(nodes[0], nodes[1], ["a://1"]) as session:
        ears = [Ear(node) for node in nodes]
        await tables.rows("insert into pgmcp.publications (kind, uri) values ('resource_updated', 'a://1')")
        await eventually(lambda: all(ear.heard == [ResourceUpdated(uri="a://1")] for ear in ears), "it is found")
        await session.until("a://1")


async def test_a_lost_line_is_made_up_for(database: str) -> None:
    async with three(database, poll=60) as (nodes, tables), reader(nodes[0], nodes[1], ["a://1"]) as session:
        ears = [Ear(node) for node in nodes]
        script = Cluster(database)
        async with lost_lines(nodes, tables):
            await script.publish(ResourceUpdated(uri="a://1"))
        assert "a://1" in await session.until("a://1")
        await quiet(ears, script)
        for ear in ears:
            assert ear.uris() == ["a://1", FENCE], "each knows what it has heard, and hears the rest once"
            assert ToolsListChanged() not in ear.heard, "nobody is told of what was not published"


async def test_after_a_takeover_a_session_is_told_once_more(database: str) -> None:
    """Its owner heard and died before it told: whoever goes on tells."""
    async with three(database, renew=0.1) as (nodes, tables), reader(nodes[0], nodes[1], ["a://1"]) as session:
        script = Cluster(database)
        await script.publish(ToolsListChanged())
        await session.stream.message(LISTS["tools"][1])
        owner = nodes[0].incarnation
        await tables.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", owner.node_id)
        await eventually(lambda: owner.lease.state is LeaseState.FENCED, "the owner knows")
        told = await session.until(FENCE)
        assert sorted(told) == sorted([LISTS["tools"][1], LISTS["tools"][1], "a://1", FENCE])


async def test_an_idle_session_that_moves_hears_nothing_when_nothing_was_published(database: str) -> None:
    async with three(database) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        await nodes[0].leave()
        await session.call(nodes[1].url, "ping")
        assert await tables.value("select max(epoch) from pgmcp.sessions") == 2
        count = (
            "select count(*) from pgmcp.events e join pgmcp.streams s on s.id = e.stream where s.kind = 'standalone'"
        )
        assert await tables.value(count) == 0


async def test_a_hand_over_in_the_middle_of_publications_loses_none(database: str) -> None:
    async with (
        three(database, drain_limit=10) as (nodes, _),
        reader(nodes[0], nodes[1], ["a://1"]) as session,
    ):
        script = Cluster(database)
        moving = asyncio.create_task(nodes[0].incarnation.drain(nothing))
        await script.publish(ResourceUpdated(uri="a://1"))
        await moving
        await session.until("a://1")


async def test_two_schemas_of_one_database_do_not_hear_each_other(database: str) -> None:
    await asyncio.to_thread(migrations.upgrade, database, "other")
    async with (
        running_node(database, server(), "one", Clock()) as one,
        running_node(database, server(), "two", Clock(), schema_name="other") as two,
    ):
        ears = [Ear(one), Ear(two)]
        await Cluster(database).publish(ResourceUpdated(uri="a://one"))
        await Cluster(database, schema_name="other").publish(ResourceUpdated(uri="a://two"))
        async with tables_of(database) as tables:
            await tables.value("select other.publish_resource_updated('a://three')")
        await quiet([ears[0]], Cluster(database))
        await quiet([ears[1]], Cluster(database, schema_name="other"))
        assert [ear.uris() for ear in ears] == [["a://one", FENCE], ["a://two", "a://three", FENCE]]


async def test_too_many_at_once_become_one_invalidation(database: str) -> None:
    async with three(database) as (nodes, tables), reader(nodes[0], nodes[1], ["a://1"]) as session:
        ears = [Ear(node) for node in nodes]
        await tables.rows("select pgmcp.publish_resource_updated('a://' || n) from generate_series(2, 3000) n")
        everything = {event for event, _ in LISTS.values()}
        await eventually(lambda: all(everything <= set(ear.heard) for ear in ears), "an invalidation")
        await session.until("a://1")
        await quiet(ears, Cluster(database))
        assert all(ear.uris() == [FENCE] for ear in ears)


# What a server is built with


async def test_a_low_level_server_publishes_to_the_bus_that_it_holds(database: str) -> None:
    bus = InMemorySubscriptionBus()
    before: list[ServerEvent] = []
    bus.subscribe(before.append)
    low = Server("low", on_subscriptions_listen=ListenHandler(bus))
    async with (
        running_node(database, low, "low", Clock(), cluster="both"),
        running_node(database, server(), "n", Clock(), cluster="both") as other,
    ):
        ear = Ear(other)
        await bus.publish(ResourceUpdated(uri="a://low"))
        await Cluster(database).publish(ToolsListChanged())
        expected = [ResourceUpdated(uri="a://low"), ToolsListChanged()]
        await eventually(lambda: ear.heard == before == expected, "both nodes hear")
    await bus.publish(PromptsListChanged())
    assert before[-1] == PromptsListChanged(), "without a node it is what it was"


async def test_a_bus_of_the_cluster_is_used_outside_of_handlers(database: str) -> None:
    bus = PostgresSubscriptionBus()
    made = MCPServer("own", subscriptions=bus)
    async with (
        running_node(database, made, "own", Clock(), poll=60, cluster="both"),
        running_node(database, server(), "n", Clock(), poll=60, cluster="both") as other,
    ):
        ear = Ear(other)
        await bus.publish(ToolsListChanged())
        await eventually(lambda: ear.heard == [ToolsListChanged()], "the other node hears")


class OwnBus(InMemorySubscriptionBus):
    """Carries events in a way of its own."""


async def test_a_server_with_a_bus_of_its_own_keeps_it(database: str, caplog: pytest.LogCaptureFixture) -> None:
    bus = OwnBus()
    heard: list[ServerEvent] = []
    bus.subscribe(heard.append)
    with caplog.at_level(logging.INFO, logger="pgmcp"):
        async with running_node(database, MCPServer("own", subscriptions=bus), "own", Clock()):
            assert type(bus) is OwnBus
            await bus.publish(ToolsListChanged())
            await Cluster(database).publish(PromptsListChanged())
            async with tables_of(database) as tables:
                assert await tables.value("select string_agg(kind, ' ') from pgmcp.publications") == (
                    "prompts_list_changed"
                )
    assert heard == [ToolsListChanged()]
    assert "keeps its own subscription bus (OwnBus)" in caplog.text


@pytest.mark.parametrize("uri", ["", "a\0b", "a\ud800", "x" * 8193], ids=["empty", "nul", "surrogate", "long"])
async def test_a_uri_that_cannot_be_stored_costs_nobody_else_theirs(database: str, uri: str) -> None:
    async with three(database) as (nodes, _):
        ear, bus = Ear(nodes[1]), nodes[0].bus
        outcomes = await asyncio.gather(
            *(bus.publish(ResourceUpdated(uri=each)) for each in ("a://1", uri, "a://2")), return_exceptions=True
        )
        assert [type(each) for each in outcomes] == [type(None), PublicationRefused, type(None)]
        await eventually(lambda: ear.uris() == ["a://1", "a://2"], "the others")
        with pytest.raises(PublicationRefused):
            await Cluster(database).publish(ResourceUpdated(uri=uri))


async def test_what_cannot_be_published_is_said_so(database: str, empty_database: str) -> None:
    with pytest.raises(PublicationRefused, match=r"mcp\.server\.subscriptions"):
        await Cluster(database).publish("tools")  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="db"):
        await Cluster(empty_database).publish(ToolsListChanged())
    with pytest.raises(DatabaseUnavailable):
        await Cluster("postgresql://u:p@127.0.0.1:1/x").publish(ToolsListChanged())
