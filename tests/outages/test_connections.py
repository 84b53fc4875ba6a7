"""Connections to PostgreSQL break, stall and slow down: nothing is lost, nothing runs twice, strangers go on."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from typing import Any

import asyncpg
import pytest

from pgmcp.clock import Clock
from pgmcp.store.notifier import TableNotifier
from pgmcp.types import NodeId
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, running_node
from tests.harness.proxy import Proxy, proxied
from tests.harness.waiting import eventually
from tests.outages.ledger import Ledger, load, run, sessions

UPDATED = "notifications/resources/updated"
BY_NOTIFY = 5.0
"""Seconds for a call that nobody had to poll for, where polls come once a minute."""

LOCK_WAIT = 0.25
"""Seconds for which a statement waits for a lock."""

KILL = {
    "the first node's line": "application_name = 'pgmcp n1 line'",
    "the second node's line": "application_name = 'pgmcp n2 line'",
    "every line": "application_name like 'pgmcp % line'",
    "every pool": "application_name in ('pgmcp n1', 'pgmcp n2', '')",  # a pooler's backends have no names
    "everything": "application_name like 'pgmcp %' or application_name = ''",
}


def identities(nodes: Sequence[RunningNode]) -> list[object]:
    return [node.incarnation.node_id for node in nodes]


@asynccontextmanager
async def listening_through_a_proxy(
    database: str, ledger: Ledger, **settings: Any
) -> AsyncIterator[tuple[Proxy, list[RunningNode]]]:
    """Two nodes; the proxy is before the line of the first one only."""
    async with proxied(database) as (proxy, through), AsyncExitStack() as stack:
        lines: tuple[dict[str, Any], ...] = ({"listen_url": through}, {})
        yield (
            proxy,
            [
                await stack.enter_async_context(
                    running_node(database, ledger.server(), f"n{number}", Clock(), **line, **settings)
                )
                for number, line in enumerate(lines, 1)
            ],
        )


async def crosswise(nodes: Sequence[RunningNode], opened: Sequence[RawSession], text: str) -> float:
    """Call each session at the node that is not its owner, at once; the longest call."""
    return max(
        await asyncio.gather(
            *(run(session, nodes[(number + 1) % 2].url, f"{text} {number}") for number, session in enumerate(opened))
        )
    )


@pytest.mark.parametrize(
    ("killed", "either_way"),
    [*((killed, "straight") for killed in KILL), ("every pool", "pooled")],
    indirect=["either_way"],
)
@pytest.mark.usefixtures("either_way")
async def test_backends_are_terminated_while_calls_run(
    database: str, ledger: Ledger, tables: Tables, killed: str
) -> None:
    """Nobody polls here within the bound of a call: what is lost with a connection is found by its replacement."""
    async with cluster(database, ledger.server, 2, poll=60) as nodes:
        before = identities(nodes)
        gone = 0

        async def weather(_: int) -> None:
            nonlocal gone
            gone += await tables.value(
                "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity "
                f"where datname = current_database() and pid <> pg_backend_pid() and ({KILL[killed]})"
            )

        async with load(nodes, ledger, weather, each=15):
            assert gone >= 3
        await eventually(lambda: all(node.incarnation.line.up for node in nodes), "every line is up again")
        async with sessions(nodes, 2) as opened:
            for turn in range(3):
                assert await crosswise(nodes, opened, f"after {turn}") < BY_NOTIFY
        assert identities(nodes) == before


@pytest.mark.parametrize("weather", ["black_hole", "stalling", "refusing"])
async def test_a_node_that_hears_nothing_polls_until_it_hears_again(
    database: str, ledger: Ledger, weather: str
) -> None:
    """Its line is cut off in each way; it is owner for one caller and edge for the other."""
    times = {"renew": 0.2, "deadline": 0.3, "statement_timeout": 1.0, "poll": 1.0}
    async with (
        listening_through_a_proxy(database, ledger, **times) as (proxy, nodes),
        sessions(nodes, 2) as opened,
    ):
        before, line = identities(nodes), nodes[0].incarnation.line
        setattr(proxy, weather, True)
        if weather != "black_hole":
            proxy.cut_all()
        await eventually(lambda: not line.up, "the loss is noticed", 3)
        for turn in range(2):
            # Both wake-ups of a call are lost for one of the sessions: each costs a poll at most.
            assert await crosswise(nodes, opened, f"deaf {turn}") < 2 * 1.0 + 0.5
        assert not line.up
        setattr(proxy, weather, False)
        proxy.cut_all()
        await eventually(lambda: line.up, "the line is reopened", 3)
        took = [await crosswise(nodes, opened, f"again {turn}") for turn in range(5)]
        assert sum(took) < 1.5, took
        assert ledger.twice == []
        assert len(ledger.ran) == 14
        assert identities(nodes) == before


async def test_postgres_is_slow(database: str, ledger: Ledger) -> None:
    async with proxied(database) as (proxy, through), cluster(through, ledger.server, 2) as nodes:
        before = identities(nodes)

        async def weather(_: int) -> None:
            proxy.delay = 0.2

        async with load(nodes, ledger, weather, each=3, count=4) as took:
            assert max(took) < 12  # some twenty round trips of 0.2 s, and what the machine takes
        assert all(node.incarnation.lease.trusted and node.incarnation.line.up for node in nodes)
        assert identities(nodes) == before
        proxy.delay = 0


async def test_an_outage_is_waited_for(database: str, ledger: Ledger, tables: Tables) -> None:
    """3 s without any connection: posts are held, streams stay open, nobody is declared dead."""
    async with (
        proxied(database) as (proxy, through),
        cluster(through, ledger.server, 2) as nodes,
        sessions(nodes, 2) as opened,
        RawSession() as fresh,
    ):
        before = identities(nodes)
        ears = [await session.get(nodes[1].url) for session in opened]
        waiting = [
            await session.request(
                nodes[number].url, "tools/call", {"name": "wait", "arguments": {"text": f"w{number}"}}, request_id="w"
            )
            for number, session in enumerate(opened)
        ]
        await eventually(lambda: len(ledger.ran) == 2, "both calls run")
        proxy.refusing = True
        proxy.cut_all()
        posts: set[asyncio.Task[Any]] = {
            asyncio.create_task(run(session, node.url, f"{place} {number}"))
            for number, session in enumerate(opened)
            for place, node in zip("ab", nodes, strict=True)
        }
        posts.add(asyncio.create_task(fresh.open(nodes[0].url)))
        done, held = await asyncio.wait(posts, timeout=3)
        assert (done, len(ledger.ran)) == (set(), 2)
        proxy.refusing = False
        ledger.gate.set()
        await asyncio.gather(*held)
        for number, exchange in enumerate(waiting):
            assert (await exchange.response("w"))["result"]["content"][0]["text"] == f"w{number}"
            assert await exchange.next() is None
            assert exchange.error is None
        for number, session in enumerate(opened):
            await session.call_tool(nodes[0].url, "update", uris=[f"test://{number}"])
            assert (await ears[number].message(UPDATED))["params"]["uri"] == f"test://{number}"
        assert len(ledger.ran) == 6
        assert ledger.twice == []
        assert identities(nodes) == before
        assert await tables.value("select count(*) from pgmcp.nodes where state = 'ready'") == 2


async def ran(session: RawSession, base: str, text: str) -> RawExchange:
    """POST a call that has its text for an id."""
    return await session.request(base, "tools/call", {"name": "run", "arguments": {"text": text}}, request_id=text)


HELD: dict[str, Any] = {"hold": 0.6, "resume_hold": 0.6, "statement_timeout": 0.4}


async def test_an_outage_longer_than_the_hold_is_said(database: str, ledger: Ledger, tables: Tables) -> None:
    async with (
        proxied(database) as (proxy, through),
        cluster(through, ledger.server, 2, **HELD) as nodes,
        sessions(nodes, 2) as opened,
        RawSession() as fresh,
    ):
        before, rows = identities(nodes), await tables.counts()
        for turn, weather in enumerate(("refusing", "black_hole"), 1):
            setattr(proxy, weather, True)
            if weather == "refusing":
                proxy.cut_all()
            start = time.monotonic()
            calls = [
                (session, node.url, f"{weather} {number} {place}")
                for number, session in enumerate(opened)
                for place, node in zip("ab", nodes, strict=True)
            ]
            answers = await asyncio.gather(
                *(ran(*call) for call in calls),
                *(session.notify(nodes[0].url, "notifications/initialized") for session in opened),
                *(session.get(nodes[1].url) for session in opened),
                fresh.initialize(nodes[0].url),
                opened[0].delete(nodes[1].url),
            )
            assert time.monotonic() - start < 3
            assert [(answer.status, "retry-after" in answer.headers) for answer in answers] == [(503, True)] * 10
            assert {answer.json()["error"]["code"] for answer in answers} == {-32603}
            setattr(proxy, weather, False)
            proxy.cut_all()
            await eventually(lambda: all(node.incarnation.line.up for node in nodes), "the lines are up")
            for call in calls:  # some may have been accepted after all, in the very moment of the return
                assert "result" in await (await ran(*call)).response(call[2])
            assert len(ledger.ran) == 4 * turn
            assert ledger.twice == []
        counts = await tables.counts()
        assert {name: counts[name] for name in ("sessions", "nodes")} == {
            name: rows[name] for name in ("sessions", "nodes")
        }
        assert identities(nodes) == before


async def test_the_hold_ends_also_while_a_statement_hangs(database: str, ledger: Ledger) -> None:
    """Whoever came while another statement hung waits no longer than its own hold."""
    times: dict[str, Any] = {"hold": 0.5, "resume_hold": 0.5, "statement_timeout": 2.0}
    async with (
        proxied(database) as (proxy, through),
        cluster(through, ledger.server, 2, **times) as nodes,
        sessions(nodes, 2) as opened,
    ):
        proxy.black_hole = True
        start = time.monotonic()
        answers = await asyncio.gather(
            *(
                session.request(node.url, "tools/call", {"name": "run", "arguments": {"text": "never"}})
                for session in opened
                for node in nodes
                for _ in range(2)
            ),
            *(session.get(nodes[1].url) for session in opened),
        )
        took = time.monotonic() - start
        proxy.black_hole = False
        proxy.cut_all()
        assert {answer.status for answer in answers} == {503}
        assert took < 1.2


@asynccontextmanager
async def locked(database: str, tables: Tables, opened: Sequence[RawSession]) -> AsyncIterator[None]:
    """Hold the rows of sessions as a takeover does."""
    hand = await asyncpg.connect(database)
    try:
        async with hand.transaction():
            names = [session.session_id for session in opened]
            await hand.fetch("select from pgmcp.sessions where session_id = any($1) order by id for update", names)
            yield
    finally:
        await hand.close()


@pytest.mark.parametrize("count", [1, 6])
async def test_locked_sessions_wait_alone(database: str, ledger: Ledger, tables: Tables, count: int) -> None:
    async with cluster(database, ledger.server, 2) as nodes, sessions(nodes, count + 4) as opened:
        guilty, strangers = opened[:count], opened[count:]

        async def stranger(number: int, session: RawSession, text: str) -> list[float]:
            return [await run(session, nodes[(number + n) % 2].url, f"{text}{number}/{n}") for n in range(12)]

        alone = await asyncio.gather(*(stranger(*pair, "a") for pair in enumerate(strangers)))

        async with asyncio.TaskGroup() as group:
            async with locked(database, tables, guilty):
                calls = [
                    group.create_task(run(session, node.url, f"g{number} {place}"))
                    for number, session in enumerate(guilty)
                    for place, node in zip("ab", nodes, strict=True)
                ]
                beside = await asyncio.gather(*(stranger(*pair, "s") for pair in enumerate(strangers)))
                assert not any(call.done() for call in calls)
                assert not any(text.startswith("g") for text in ledger.ran)
            await asyncio.wait(calls, timeout=3)
            assert all(call.done() for call in calls)
        assert ledger.twice == []
        usual, took = sorted(chain(*alone)), sorted(chain(*beside))
        assert len(ledger.ran) == len(usual) + len(took) + len(calls)
        # The first ones meet the lock, and a busy machine may stall some; if strangers had to wait, most would.
        assert statistics.median(took) < statistics.median(usual) + LOCK_WAIT, took


async def test_without_any_wake_up_polls_are_enough(
    database: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed and never announced: each of a call's two wake-ups that is lost costs one poll at most."""
    async with cluster(database, ledger.server, 2, poll=0.5) as nodes, sessions(nodes, 4) as opened:
        lost: list[tuple[NodeId | None, str]] = []

        async def drop(_: TableNotifier, payloads: Sequence[tuple[NodeId | None, str]]) -> None:
            lost.extend(payloads)

        monkeypatch.setattr(TableNotifier, "notify", drop)
        for turn in range(3):
            assert await crosswise(nodes, opened, f"{turn}") < 0.5 + 1
        assert len(lost) >= 12
        assert ledger.twice == []
