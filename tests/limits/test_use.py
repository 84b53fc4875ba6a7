"""What counts as use: whatever a client does or carries, until it ends, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pgmcp.errors import DatabaseUnavailable
from pgmcp.store.notifier import channel
from pgmcp.store.retention import Retention
from pgmcp.types import ANONYMOUS, Cursor
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, lost_lines, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

both = pytest.mark.parametrize("edge", [0, 1])
HOUR = 3600.0
LATER = 62.0
"""Seconds by which use may be later than it is noted, and a bit."""

NOTHING = """
select not exists (select from pgmcp.streams where sink is not null)
   and not exists (select from pgmcp.requests where finished_at is null)
"""


def retention(node: RunningNode) -> Retention:
    return node.retention


async def age(tables: Tables, seconds: float) -> None:
    """Let time pass since the last use that was noted."""
    text = "update pgmcp.sessions set last_active_at = last_active_at - make_interval(secs => $1)"
    await tables.execute(text, seconds)


async def has_the_whole_time(tables: Tables, nodes: Sequence[RunningNode], seconds: float = HOUR) -> None:
    """Check that a session which nothing is left of any more may still be idle for so long, and then ends."""
    await eventually(lambda: tables.value(NOTHING), "nothing is carried or runs")
    for node in nodes:
        assert await retention(node).expire() == []
    await age(tables, seconds - 1)
    assert await retention(nodes[0]).expire() == []
    await age(tables, LATER)
    assert len(await retention(nodes[-1]).expire()) == 1


@both
@pytest.mark.parametrize("how", ["client", "drain", "server", "next"])
async def test_a_stream_is_use_until_it_is_let_go(database: str, talker: Talker, edge: int, how: str) -> None:
    """Whoever lets go: the client, a leaving node, the server that closes the connection, or one that took it over."""
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        stream = await session.get(nodes[edge].url)
        await age(tables, 2 * HOUR)
        assert await retention(nodes[edge]).expire() == []
        match how:
            case "client":
                await stream.close()
            case "drain":
                nodes[edge].incarnation.edge.leave(at_once=True)
                await stream.rest()
            case "server":
                [actor] = nodes[0].actors.values()
                await nodes[0].incarnation.log.drop_sink(actor.ownership, None)
            case "next":
                other = await session.get(nodes[1 - edge].url)
                await age(tables, 2 * HOUR)
                await other.close()
        await has_the_whole_time(tables, nodes)


@both
async def test_a_call_is_use_until_it_ends(database: str, talker: Talker, edge: int) -> None:
    """Also while nobody carries its stream."""
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        call = await session.request(nodes[edge].url, "tools/call", {"name": "hold", "arguments": {}})
        await eventually(lambda: talker.running == 1, "the call runs")
        await call.close()
        released = "select not exists (select from pgmcp.streams where sink is not null)"
        await eventually(lambda: tables.value(released), "its stream is let go")
        await age(tables, 2 * HOUR)
        assert await retention(nodes[edge]).expire() == []
        talker.release.set()
        await has_the_whole_time(tables, nodes)


@both
async def test_a_notification_is_use(database: str, talker: Talker, edge: int) -> None:
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        await age(tables, HOUR)
        assert (await session.notify(nodes[edge].url, "notifications/x")).status == 202
        await has_the_whole_time(tables, nodes)


@pytest.mark.parametrize(("path", "seconds"), [("/mcp", HOUR), ("/sse", 60.0)])
async def test_a_stream_whose_edge_has_crashed_was_use_until_that_is_noticed(
    database: str, talker: Talker, path: str, seconds: float
) -> None:
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession(path=path) as session,
    ):
        if path == "/mcp":
            await session.open(nodes[0].url)
        stream = await session.get(nodes[0].url)
        carried = "select sink is not null from pgmcp.streams where kind = 'standalone'"
        await eventually(lambda: tables.value(carried), "the stream is carried")
        await tables.execute(
            "insert into pgmcp.nodes (node_id, name, address, state, expires_at, version, schema_revision) "
            "values (gen_random_uuid(), 'crashed', '', 'dead', now(), '', '')"
        )
        await tables.execute(
            "update pgmcp.streams set sink = (select node_id from pgmcp.nodes where name = 'crashed') "
            "where kind = 'standalone'"
        )
        await age(tables, 2 * HOUR)
        assert await retention(nodes[1]).expire() == []
        await retention(nodes[1]).prune()
        await has_the_whole_time(tables, nodes, seconds)
        await stream.close()


@pytest.mark.parametrize("how", ["never", "late"])
async def test_a_stream_that_nobody_carries_is_let_go_by_its_node(
    database: str, talker: Talker, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The database was away for longer than the hold when it was let go; or it became the sink when nobody waited."""
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR, idle_poll=0.2, statement_timeout=1) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        log = nodes[1].incarnation.log
        if how == "late":
            await log.attach(session.session_id, ANONYMOUS, None)
        else:
            stream = await session.get(nodes[1].url)
            with monkeypatch.context() as patch:
                lost = asyncio.Event()

                async def away(cursor: Cursor, *, keep: bool = False) -> bool:
                    lost.set()
                    raise DatabaseUnavailable

                patch.setattr(log, "release", away)
                await stream.close()
                await lost.wait()
        other = await session.request(nodes[1].url, "tools/call", {"name": "hold", "arguments": {}})
        await age(tables, 2 * HOUR)
        free = "select not exists (select from pgmcp.streams where sink is not null and kind = 'standalone')"
        await eventually(lambda: tables.value(free), "the stream is free")
        assert await tables.value("select count(*) from pgmcp.streams where sink is not null") == 1
        talker.release.set()
        await other.rest()
        await has_the_whole_time(tables, nodes)


async def test_wake_ups_that_bring_nothing_are_no_use(database: str, talker: Talker) -> None:
    """Neither "look at everything" nor a line that was reopened, nor a node that hears nothing and polls."""
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        await eventually(lambda: tables.value(NOTHING), "nothing is carried or runs")
        await age(tables, HOUR + LATER)
        incarnation = nodes[0].incarnation

        async def has_looked() -> None:
            await eventually(lambda: not incarnation.catch_up.wanted, "it looks")
            await eventually(lambda: incarnation.host.movable(busy=True), "it has looked")

        for payload in ("*", "?"):
            where = channel("pgmcp", incarnation.node_id)
            await tables.rows("select pg_notify($1, $2)", where, payload)
        await eventually(lambda: incarnation.junk, "what was said before is heard, too")
        await has_looked()
        async with lost_lines(nodes, tables):
            pass
        await has_looked()
        await incarnation.host.poll()
        await incarnation.host.survey()
        assert len(await retention(nodes[1]).expire()) == 1


async def test_use_is_noted_once_a_minute(database: str, talker: Talker) -> None:
    """A row that is written for each call gets slow beside a neighbour's long transaction."""
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        written = "select xmin::text from pgmcp.sessions"
        await session.call(nodes[1].url, "ping")
        await eventually(lambda: tables.value(NOTHING), "nothing is carried or runs")
        before = await tables.value(written)

        async def used() -> None:
            for node in nodes:
                await session.call(node.url, "ping")
                await session.notify(node.url, "notifications/x")
                stream = await session.get(node.url)
                await stream.close()
            await eventually(lambda: tables.value(NOTHING), "nothing is carried or runs")

        await used()
        assert await tables.value(written) == before
        await age(tables, LATER)
        aged = await tables.value(written)
        await used()
        noted = await tables.value(written)
        assert noted != aged
        await used()
        assert await tables.value(written) == noted


async def test_a_handshake_that_is_never_ended_is_not_waited_for(database: str, talker: Talker) -> None:
    async with (
        cluster(database, talker, 2, idle_timeout=HOUR) as nodes,
        tables_of(database) as tables,
        RawSession() as half,
        RawSession() as whole,
    ):
        await whole.open(nodes[0].url)
        answer = await half.initialize(nodes[0].url)
        await answer.rest()
        await eventually(lambda: tables.value(NOTHING), "nothing is carried or runs")
        await age(tables, 59)
        assert await retention(nodes[1]).expire() == []
        await age(tables, LATER)
        await nodes[1].sweep()
        assert (await half.notify(nodes[0].url, "notifications/initialized")).status == 404
        assert (await whole.call(nodes[1].url, "ping"))["result"] == {}
