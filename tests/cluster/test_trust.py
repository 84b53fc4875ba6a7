"""What a node may do without a lease: nothing that others could contradict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from pgmcp.cluster.lease import LeaseState
from pgmcp.errors import DatabaseUnavailable
from pgmcp.types import Cursor
from tests.harness.clients import RawExchange, RawSession, SseEvent
from tests.harness.cluster import RunningNode, cluster, everything, tables_of
from tests.harness.waiting import eventually

SHORT: dict[str, Any] = {"renew": 0.1, "deadline": 0.1, "trust": 0.5, "ttl": 1.0, "keepalive": 0.2}
WATCHED, UPDATED = "test://watched-resource", "notifications/resources/updated"


def slow(seconds: float = 60, steps: int = 1000) -> dict[str, Any]:
    return {"name": "slow", "arguments": {"seconds": seconds, "steps": steps}, "_meta": {"progressToken": 1}}


async def falls(node: RunningNode, state: LeaseState) -> None:
    await eventually(lambda: node.incarnation.lease.state is state, f"{node.node.settings.node_name} is {state}", 5)


class Cut:
    """Renewals that fail until they are let through again, while nobody else may declare the node dead."""

    def __init__(self, node: RunningNode, other: RunningNode) -> None:
        self._line, self._other = node.incarnation.line, other.incarnation.lease
        self._renew = self._line.renew

    def __enter__(self) -> Cut:
        async def renew() -> float | None:
            message = "cut"
            raise DatabaseUnavailable(message)

        self._line.renew = renew  # type: ignore[method-assign]  # until the context ends
        self._other.may_condemn = lambda: (False, False)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._line.renew = self._renew  # type: ignore[method-assign]


LOSE = {
    "deleted": "delete from pgmcp.nodes where node_id = $1",
    "dead": "update pgmcp.nodes set state = 'dead' where node_id = $1",
}


@pytest.mark.parametrize("lost", LOSE)
async def test_a_node_that_was_declared_dead_stops_and_joins_again(database: str, lost: str) -> None:
    async with (
        cluster(database, everything, 2, renew=0.1) as nodes,
        tables_of(database) as tables,
        RawSession(capabilities={"elicitation": {"form": {}}}) as session,
        RawSession() as other,
        RawSession() as later,
    ):
        await session.open(nodes[0].url)
        await other.open(nodes[1].url)
        calls = [await session.request(node.url, "tools/call", slow()) for node in nodes]
        foreign = await other.request(nodes[0].url, "tools/call", slow(), request_id=50)
        for call in (*calls, foreign):
            await call.message("notifications/progress")
        standalone = await session.get(nodes[0].url)
        old = nodes[0].incarnation
        await tables.execute(LOSE[lost], old.node_id)
        await eventually(lambda: old.lease.state is LeaseState.FENCED, "the node knows", 2)
        events = await tables.value("select count(*) from pgmcp.events")
        for stream in (calls[0], standalone, foreign):  # those that the node carried
            await stream.rest(timeout=5)
            assert stream.error is None, "ended with the final chunk"
            assert not [message for message in stream.messages if "error" in message]

        async def joined() -> bool:
            return nodes[0].present not in {None, old} and nodes[0].incarnation.lease.trusted

        await eventually(joined, "the node joins again")
        assert nodes[0].incarnation.node_id != old.node_id
        assert await tables.value("select term from pgmcp.history") == 0, "no commit was lost"
        assert (old.host.sessions, len(old.open_streams), old.line.up) == (0, 0, False)
        assert await tables.value("select state from pgmcp.nodes where node_id = $1", old.node_id) in {None, "dead"}
        assert (
            await tables.value("select state from pgmcp.nodes where node_id = $1", nodes[0].incarnation.node_id)
            == "ready"
        )
        await later.open(nodes[0].url, nodes[1].url)
        assert (await later.call_tool(nodes[1].url, "count"))["structuredContent"] == {"result": 1}
        # the other owner's session goes on, also through the node that came back
        resumed = await other.get(nodes[0].url, foreign.last_event_id)
        await resumed.message("notifications/progress")
        await other.notify(nodes[0].url, "notifications/cancelled", {"requestId": 50})
        assert (await resumed.response(50))["error"]["code"] == -32800
        # not a word of the muted actors was stored after the fence
        of_session = (
            "select count(*) from pgmcp.events e join pgmcp.streams s on s.id = e.stream "
            "join pgmcp.sessions x on x.id = s.session where x.session_id = $1 and e.message like $2"
        )
        assert events >= 3
        assert await tables.value(of_session, session.session_id, b"%Connection closed%") == 0


async def test_a_zombie_can_store_nothing(database: str) -> None:
    """The node does not know yet that its session has another owner: what its actor says is refused."""
    async with (
        cluster(database, everything, 2) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        call = await session.request(nodes[1].url, "tools/call", slow(60, 6000))
        await call.message("notifications/progress")
        await tables.execute(
            "update pgmcp.sessions set owner = $1, epoch = epoch + 1 where session_id = $2",
            nodes[1].incarnation.node_id,
            session.session_id,
        )
        after = await tables.value("select count(*) from pgmcp.events")
        await eventually(lambda: nodes[0].incarnation.host.sessions == 0, "the actor is dropped")
        assert await tables.value("select count(*) from pgmcp.events") <= after + 1  # one was being committed
        assert await tables.value("select count(*) from pgmcp.sessions") == 1


async def stays(condition: Callable[[], object], renewals: int, node: RunningNode) -> None:
    """A condition holds while the node tries to renew some more times."""
    for _ in range(renewals):
        ticked = node.incarnation.lease.ticked_at

        def tried(ticked: float = ticked) -> bool:
            return node.incarnation.lease.ticked_at > ticked

        await eventually(tried, "it tries")
        value = condition()
        assert await value if asyncio.iscoroutine(value) else value


async def test_a_suspended_owner_starts_and_stores_nothing_and_goes_on_later(database: str) -> None:
    async with (
        cluster(database, everything, 2, **SHORT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        identity = nodes[0].incarnation.node_id
        running = await session.request(nodes[1].url, "tools/call", slow(1.5, 150))
        await running.message("notifications/progress")
        standalone = await session.get(nodes[0].url)
        with Cut(nodes[0], nodes[1]):
            await falls(nodes[0], LeaseState.SUSPENDED)
            stored = await tables.value("select count(*) from pgmcp.events")
            at_once = await session.request(nodes[1].url, "tools/call", {"name": "count"})
            assert at_once.status == 200, "the other node promises it"
            held = asyncio.create_task(session.request(nodes[0].url, "tools/call", {"name": "count"}))
            unclaimed = "select count(*) from pgmcp.requests where rpc_id is not null and claimed_epoch is null"
            comments = standalone.comments, running.comments

            async def nothing() -> bool:
                events, waits = await tables.value("select count(*) from pgmcp.events"), await tables.value(unclaimed)
                assert (events, waits) == (stored, 1)
                return not held.done()

            await stays(nothing, 15, nodes[0])  # longer than the call that runs
            assert standalone.error is running.error is None
            await eventually(lambda: standalone.comments > comments[0], "comments come")
            await eventually(lambda: running.comments > comments[1], "comments come")
            assert nodes[0].incarnation.lease.state is LeaseState.SUSPENDED
        await falls(nodes[0], LeaseState.TRUSTED)
        await running.rest()
        assert [message["params"]["progress"] for message in running.messages[:-1]] == list(range(1, 151))
        assert "result" in running.messages[-1]
        results = []
        for call in (at_once, await held):
            await call.rest()
            results.append(call.messages[-1]["result"]["structuredContent"]["result"])
        assert sorted(results) == [1, 2]
        assert nodes[0].incarnation.node_id == identity
        assert standalone.error is None
        await session.call(nodes[0].url, "resources/subscribe", {"uri": WATCHED})
        await session.call_tool(nodes[0].url, "touch_watched_resource", text="x")
        await standalone.message(UPDATED)


async def test_a_suspended_edge_writes_comments_only(database: str) -> None:
    """Events of a healthy owner wait at the edge that lost its trust; then they come, once and in order."""
    async with (
        cluster(database, everything, 2, **SHORT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        calls = [
            await session.request(nodes[1].url, "tools/call", slow(0.8, 40)),
            await session.request(nodes[1].url, "tools/call", slow(1, 1)),
        ]
        await calls[0].message("notifications/progress")
        assert (await calls[1].event()).is_priming
        with Cut(nodes[1], nodes[0]):
            await falls(nodes[1], LeaseState.SUSPENDED)
            while (event := await drained(calls[0])) is not None:
                assert event.message is None or "result" not in event.message
            finished = "select count(*) from pgmcp.requests where method = 'tools/call' and finished_at is not null"

            async def all_finished() -> bool:
                return bool(await tables.value(finished) == 2)

            await eventually(all_finished, "the owner has finished")
            comments = [call.comments for call in calls]
            for call, before in zip(calls, comments, strict=True):

                def commented(call: RawExchange = call, before: int = before) -> bool:
                    return call.comments > before + 1

                await eventually(commented, "comments come", 3)
                assert await drained(call) is None, "no event without trust"
        for call in calls:
            await call.rest()
            assert call.error is None
            assert "result" in call.messages[-1]
        for call, steps in zip(calls, (40, 1), strict=True):
            assert [message["params"]["progress"] for message in call.messages[:-1]] == list(range(1, steps + 1))


async def test_a_suspended_edge_that_is_fenced_ends_its_streams(database: str) -> None:
    """Also those for which it has read something that it may not write any more."""
    async with (
        cluster(database, everything, 2, **SHORT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        silent = {"name": "slow", "arguments": {"seconds": 0.8, "steps": 1}}  # its answer is its only event
        call = await session.request(nodes[1].url, "tools/call", silent, request_id=9)
        await call.next()
        with Cut(nodes[1], nodes[0]):
            await falls(nodes[1], LeaseState.SUSPENDED)
            finished = "select count(*) from pgmcp.requests where method = 'tools/call' and finished_at is not null"
            await eventually(lambda: tables.value(finished), "the owner has finished")
            before = call.comments
            await eventually(lambda: call.comments > before + 1, "comments come")
            await tables.execute(
                "update pgmcp.nodes set state = 'dead' where node_id = $1", nodes[1].incarnation.node_id
            )
        await call.rest(timeout=5)
        assert call.error is None
        assert not [message for message in call.messages if "result" in message]
        # nobody has read the answer: the same request again gets it, and does not run again
        again = await session.request(nodes[0].url, "tools/call", silent, request_id=9)
        assert "result" in await again.response(9)
        assert await tables.value("select count(*) from pgmcp.requests where rpc_id = '9'") == 1


async def drained(exchange: RawExchange) -> SseEvent | None:
    """An event that has arrived already, if any."""
    try:
        return await exchange.next(0.001)
    except TimeoutError:
        return None


async def test_a_client_that_goes_while_its_edge_is_suspended_is_let_go(database: str) -> None:
    async with (
        cluster(database, everything, 2, **SHORT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        call = await session.request(nodes[1].url, "tools/call", slow(0.6, 3))
        await call.next()
        with Cut(nodes[1], nodes[0]):
            await falls(nodes[1], LeaseState.SUSPENDED)
            finished = "select count(*) from pgmcp.requests where method = 'tools/call' and finished_at is not null"
            await eventually(lambda: tables.value(finished), "the owner has finished")
            await call.close()
            await eventually(lambda: len(nodes[1].incarnation.open_streams) == 0, "the exchange ends", 3)
        resumed = await session.get(nodes[0].url, call.last_event_id)
        await resumed.rest()
        assert "result" in resumed.messages[-1]


async def test_comments_go_on_while_the_database_does_not_answer(database: str) -> None:
    """The edge cannot read its streams; sockets stay open, and what was stored meanwhile comes afterwards."""
    async with (
        cluster(database, everything, 2, keepalive=0.2) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        call = await session.request(nodes[1].url, "tools/call", slow(0.5, 10))
        await call.message("notifications/progress")
        store = nodes[1].database
        fetch = store.fetch

        async def gone(name: str, *args: object, **more: Any) -> list[asyncpg.Record]:
            if name == "read_streams":
                message = "cut"
                raise ConnectionError(message)
            return await fetch(name, *args, **more)

        store.fetch = gone  # type: ignore[method-assign]  # one statement of it
        try:
            finished = "select count(*) from pgmcp.requests where method = 'tools/call' and finished_at is not null"
            await eventually(lambda: tables.value(finished), "the owner has finished")
            before = call.comments
            await eventually(lambda: call.comments > before + 2, "comments come", 3)
        finally:
            del store.fetch
        await call.rest()
        assert call.error is None
        assert [message["params"]["progress"] for message in call.messages[:-1]] == list(range(1, 11))
        assert "result" in call.messages[-1]


async def test_trust_that_ends_while_a_delivery_is_noted(database: str) -> None:
    """It is asked for last: nothing is written after a round trip that lasted longer than the trust before it."""
    async with (
        cluster(database, everything, 2, **SHORT) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        listening = await session.get(nodes[1].url)
        await listening.next()
        log = nodes[1].incarnation.log
        release, noting, go_on = log.release, asyncio.Event(), asyncio.Event()

        async def late(cursor: Cursor, *, keep: bool = False) -> bool:
            held = await release(cursor, keep=keep)
            noting.set()
            await go_on.wait()
            return held

        log.release = late  # type: ignore[method-assign]  # it takes its time
        await session.call(nodes[0].url, "resources/subscribe", {"uri": WATCHED})
        await session.call_tool(nodes[0].url, "touch_watched_resource", text="x")
        async with asyncio.timeout(5):
            await noting.wait()
        with Cut(nodes[1], nodes[0]):
            await falls(nodes[1], LeaseState.SUSPENDED)
            go_on.set()
            before = listening.comments
            await eventually(lambda: listening.comments > before + 2, "comments come", 3)
            assert await drained(listening) is None, "no event without trust"
        await listening.message(UPDATED)
        del log.release
        assert await tables.value("select count(*) from pgmcp.events where topic is not null") == 1
