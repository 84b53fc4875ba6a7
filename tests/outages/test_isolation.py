"""Neighbours in one PostgreSQL do not hear each other, and a node is a good neighbour to everybody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import pytest

from pgmcp.clock import Clock, Ids
from pgmcp.node import incarnation
from pgmcp.store.line import Line
from pgmcp.store.notifier import TableNotifier, channel
from pgmcp.store.schema import migrations
from pgmcp.types import StreamId
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, running_node
from tests.harness.proxy import proxied
from tests.harness.waiting import eventually
from tests.outages.ledger import Ledger, load, run, sessions, unread_flood


class KeepingLine(Line):
    """A line that keeps what it hears."""

    def __init__(
        self, *args: Any, on_payload: Callable[[str], None], on_broadcast: Callable[[str], None], **more: Any
    ) -> None:
        self.heard: list[str] = []

        def noted(known: Callable[[str], None]) -> Callable[[str], None]:
            def note(payload: str) -> None:
                self.heard.append(payload)
                known(payload)

            return note

        super().__init__(*args, on_payload=noted(on_payload), on_broadcast=noted(on_broadcast), **more)


@pytest.fixture(autouse=True)
def keeping_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes' lines keep what they hear."""
    monkeypatch.setattr(incarnation, "Line", KeepingLine)


def heard_by(nodes: Sequence[RunningNode]) -> list[str]:
    """Every payload that reaches these nodes from now on."""
    heard: list[str] = []
    for node in nodes:
        line = node.incarnation.line
        assert isinstance(line, KeepingLine)
        line.heard = heard
    return heard


@pytest.mark.parametrize("apart", ["schemas", "databases"])
async def test_two_clusters_in_one_postgres_do_not_hear_each_other(
    database: str, second_database: str, apart: str
) -> None:
    """The same node names, the same internal session ids, the same instance."""
    ledgers = Ledger(), Ledger()
    settings: dict[str, Any] = {}
    other = second_database
    if apart == "schemas":
        other, settings = database, {"schema_name": "neighbour"}
        await asyncio.to_thread(migrations.upgrade, database, "neighbour")
    async with (
        cluster(database, ledgers[0].server, 2) as here,
        cluster(other, ledgers[1].server, 2, **settings) as there,
        sessions(here, 2) as ours,
        sessions(there, 2) as theirs,
    ):
        assert [node.incarnation.host.sessions for node in (*here, *there)] == [1] * 4
        keys = [set(nodes[0].actors) for nodes in (here, there)]
        assert keys[0] == keys[1]
        heard = heard_by(here), heard_by(there)
        for turn in range(3):
            for number, session in enumerate(ours):
                await run(session, here[1 - number].url, f"{number}/{turn}")
        assert len(heard[0]) >= 12
        assert (heard[1], ledgers[1].ran) == ([], [])
        for nodes, strangers in ((here, theirs), (there, ours)):
            for session in strangers:
                for node in nodes:
                    assert (await session.request(node.url, "ping")).status == 404
                    assert (await session.get(node.url)).status == 404
                    assert (await session.delete(node.url)).status == 404
        assert (await ours[0].delete(here[0].url)).status < 300
        await eventually(lambda: not here[0].incarnation.host.sessions, "the session is over")
        assert heard[1] == []
        for number, session in enumerate(theirs):
            await run(session, there[1 - number].url, str(number))
        assert heard[1]
        assert len(ledgers[0].ran) == 6


class Skewed(Clock):
    """A wall clock that is wrong."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def wall(self) -> float:
        return super().wall() + self.seconds


class SkewedIds(Ids):
    """Ids of a machine whose wall clock is wrong."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def uuid(self) -> UUID:
        return UUID(int=super().uuid().int + (self.seconds * 1000 << 80))


@asynccontextmanager
async def nodes_of(
    database: str, ledger: Ledger, names: Sequence[str], skews: Sequence[int] = (0, 0), **settings: Any
) -> AsyncIterator[list[RunningNode]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                running_node(database, ledger.server(), name, Skewed(skew), ids=SkewedIds(skew), **settings)
            )
            for name, skew in zip(names, skews, strict=True)
        ]


async def test_nodes_may_have_the_same_name(database: str, ledger: Ledger, tables: Tables) -> None:
    """DBOS's "local", Oban's peers by name: a name is a label, and the default is the same everywhere."""
    async with nodes_of(database, ledger, ["node", "node"], poll=60) as nodes:
        rows = await tables.rows("select node_id, name, state, line_pid from pgmcp.nodes")
        assert len({row["node_id"] for row in rows}) == len({row["line_pid"] for row in rows}) == 2
        assert {(row["name"], row["state"]) for row in rows} == {("node", "ready")}
        async with sessions(nodes, 2) as opened:
            owners = await tables.rows("select distinct owner from pgmcp.sessions")
            assert len(owners) == 2
            heard = heard_by(nodes[:1]), heard_by(nodes[1:])
            for number, session in enumerate(opened):
                assert await run(session, nodes[1 - number].url, str(number)) < 10
            for payloads in heard:  # each is once the owner and once the edge: "look at inbox …", "look at stream …"
                assert sorted(word[0] for payload in payloads for word in payload.split(",")) == ["i", "t"]
        await eventually(lambda: all(node.incarnation.lease.trusted for node in nodes), "both live")
    assert await tables.value("select count(*) from pgmcp.nodes where state = 'left'") == 2


@pytest.mark.parametrize("skew", [60, -60])
async def test_a_wrong_wall_clock_changes_nothing(database: str, ledger: Ledger, tables: Tables, skew: int) -> None:
    """Oban's leases were stolen by the fast clock; here the database's clock decides, and numbers order messages."""
    async with nodes_of(database, ledger, ["n1", "n2"], [0, skew], poll=60, renew=0.1) as nodes:
        before = [node.incarnation.node_id for node in nodes]

        async def weather(_: int) -> None:
            leases = await tables.rows("select expires_at - renewed_at as left from pgmcp.nodes where state = 'ready'")
            assert [round(row["left"].total_seconds()) for row in leases] == [10, 10]

        async with load(nodes, ledger, weather, each=10) as took:
            assert max(took) < 10
        async with sessions(nodes, 2) as opened:  # order within a session, also between ids of the two clocks
            for session in opened:
                ledger.ran.clear()
                for turn in range(8):
                    await run(session, nodes[turn % 2].url, str(turn))
                assert ledger.ran == [str(turn) for turn in range(8)]
        assert [node.incarnation.node_id for node in nodes] == before


XMIN = """
select count(*) from pg_stat_activity
where datname = current_database() and application_name like 'pgmcp %' and (
    backend_xmin is not null and now() - query_start > interval '1 second'
    or state like 'idle in transaction%')
"""


async def test_a_client_that_does_not_read_holds_no_snapshot(database: str, ledger: Ledger, tables: Tables) -> None:
    async with cluster(database, ledger.server, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        async with unread_flood(nodes[1], session) as reader:
            await eventually(lambda: ledger.ran == ["flood"], "the tool is done", 20)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            stuck = "select count(*) from pgmcp.streams where next_seq = 82 and sink is not null and closed"
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                assert await tables.value(XMIN) == 0
                assert await tables.value(stuck) == 1
                await run(session, nodes[1].url, "meanwhile")


async def test_a_line_that_does_not_read_pins_no_snapshot_for_long(
    database: str, ledger: Ledger, tables: Tables
) -> None:
    """graphile_worker_rs #456: a LISTEN backend that cannot write holds back VACUUM for the whole database."""
    async with (
        proxied(database) as (proxy, through),
        running_node(database, ledger.server(), "n1", Clock(), listen_url=through) as node,
    ):
        line, name = node.incarnation.line, channel("pgmcp", node.incarnation.node_id)
        pid = await tables.value("select line_pid from pgmcp.nodes")
        mine = "select count(*) from pg_stat_activity where pid = $1 and "
        proxy.hearing.clear()

        async def blocked() -> bool:
            await tables.execute("select pg_notify($1, repeat('x', 7000) || n) from generate_series(1, 100) n", name)
            return bool(await tables.value(mine + "wait_event = 'ClientWrite'", pid) == 1)

        async def free() -> bool:
            return bool(await tables.value(mine + "(backend_xmin is not null or wait_event = 'ClientWrite')", pid) == 0)

        await eventually(blocked, "the backend cannot write any more")
        await eventually(free, "the backend is let go", 4)
        proxy.hearing.set()
        await eventually(lambda: line.up, "the line is back")
        assert node.incarnation.lease.trusted


LOCKS = """
select count(*) from pg_locks
where not granted and locktype = 'object' and classid = 'pg_database'::regclass
"""


async def test_a_storm_of_wake_ups_is_one_notify_at_a_time(
    database: str, ledger: Ledger, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recall.ai: NOTIFY in every write transaction serialised the instance."""
    async with cluster(database, ledger.server, 3, poll=60) as nodes, sessions(nodes, 3) as opened:
        flying: dict[TableNotifier, int] = {}
        most, sent, waits, looks = 0, 0, 0, 0
        notify = TableNotifier.notify

        async def counted(notifier: TableNotifier, payloads: Any) -> None:
            nonlocal most, sent
            flying[notifier] = flying.get(notifier, 0) + 1
            most, sent = max(most, flying[notifier]), sent + 1
            try:
                await notify(notifier, payloads)
            finally:
                flying[notifier] -= 1

        monkeypatch.setattr(TableNotifier, "notify", counted)
        ids, over = Ids(), asyncio.Event()

        async def storm(number: int) -> None:
            wakeups = nodes[number].incarnation.wakeups
            for turn in range(500):
                target = nodes[(number + 1 + turn % 2) % 3].incarnation.node_id
                wakeups.stream(target, StreamId(ids.uuid()))
                if turn % 5 == 0:
                    await asyncio.sleep(0)

        async def look() -> None:
            nonlocal waits, looks
            while not over.is_set():
                waits += await tables.value(LOCKS)
                looks += 1

        watcher = asyncio.create_task(look())
        took: list[float] = []
        for turn in range(3):
            calls = [
                run(session, nodes[(number + 1) % 3].url, f"{number}/{turn}") for number, session in enumerate(opened)
            ]
            _, seconds = await asyncio.gather(
                asyncio.gather(*(storm(number) for number in range(3))), asyncio.gather(*calls)
            )
            took += seconds
        over.set()
        await watcher
        assert most == 1
        assert sent < 3 * 3 * 500 / 2
        assert looks > 10
        assert waits <= looks / 10, (waits, looks)
        assert max(took) < 2
        assert await tables.value("select pg_notification_queue_usage()") < 0.01
