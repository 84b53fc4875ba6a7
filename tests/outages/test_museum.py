"""What others shipped (the bug museum), each with a test that would have caught it.

Most of it is shown elsewhere; ``ELSEWHERE`` names the tests, and a test here sees to it that they exist.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

import pgmcp
from pgmcp.settings import Settings
from pgmcp.store import line as line_module
from pgmcp.types import Cursor, Page
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, cluster
from tests.harness.proxy import proxied
from tests.harness.stores import Watcher, line_connection, opened, own_sql, request, store
from tests.harness.waiting import eventually
from tests.outages.ledger import Ledger, run, sessions, unread_flood

ELSEWHERE = {
    "01 River: never pinged": "tests/store/test_line.py::test_a_black_hole_is_noticed_in_eight_seconds",
    "02 pg-listen: not listening after a reconnect": (
        "tests/store/test_line.py::test_a_terminated_line_is_reopened_and_hears_again"
    ),
    "03 solid_cable: a lower id that commits late": (
        "tests/store/test_inbox.py::test_a_message_that_commits_late_is_claimed_all_the_same"
    ),
    "03 solid_cable: a publication that commits late": (
        "tests/store/test_publication_rows.py::test_what_commits_late_is_read_and_what_is_rolled_back_is_not"
    ),
    "05 socket.io: a publication that is gone before it was read": (
        "tests/unit/test_publication_reader.py::test_an_absence_is_a_gap"
    ),
    "06 socket.io: a publication that is stored, not announced": (
        "tests/cluster/test_publications.py::test_what_woke_nobody_is_found_by_the_poll"
    ),
    "06 socket.io: stored, not announced": (
        "tests/outages/test_connections.py::test_without_any_wake_up_polls_are_enough"
    ),
    "07 Hatchet: another path for large messages": ("tests/outages/test_sizes.py::test_every_size_takes_the_same_path"),
    "08 DBOS: one bad payload drops the rest": (
        "tests/unit/test_wakeups.py::test_words_that_only_look_like_ours_cost_nobody_theirs"
    ),
    "08 DBOS: one bad publication drops the rest": (
        "tests/cluster/test_publications.py::test_a_uri_that_cannot_be_stored_costs_nobody_else_theirs"
    ),
    "10 River, Hatchet: more publications than one look lists": (
        "tests/cluster/test_publications.py::test_too_many_at_once_become_one_invalidation"
    ),
    "10 River, Hatchet: a full buffer drops silently": (
        "tests/unit/test_wakeups.py::test_an_outage_keeps_a_bounded_number_of_ids"
    ),
    "11 asyncpg: callbacks out of order": "tests/store/test_line.py::test_payloads_come_in_order",
    "12 asyncpg: lost between LISTEN and register": (
        "tests/store/test_line.py::test_the_reset_comes_when_listen_is_in_force"
    ),
    "13 Oban: the wall clock decides": "tests/outages/test_isolation.py::test_a_wrong_wall_clock_changes_nothing",
    "14 Oban: peers by name": "tests/outages/test_isolation.py::test_nodes_may_have_the_same_name",
    "15 DBOS: replicas share an id": "tests/outages/test_isolation.py::test_nodes_may_have_the_same_name",
    "16 procrastinate: a heartbeat that hits no row": (
        "tests/cluster/test_trust.py::test_a_node_that_was_declared_dead_stops_and_joins_again"
    ),
    "17 Hatchet: a zombie is put back": (
        "tests/cluster/test_trust.py::test_a_node_that_was_declared_dead_stops_and_joins_again"
    ),
    "18 River: connected, and nothing comes": (
        "tests/store/test_line.py::test_a_proxy_that_stalls_after_connect_holds_nobody_for_ever"
    ),
    "19 River: a backoff longer than the lease": (
        "tests/unit/test_lease.py::test_settings_that_break_the_timing_rule_are_refused"
    ),
    "22 pgqueuer: more orphans than may be recovered at once": (
        "tests/cluster/test_restore.py::test_many_sessions_are_taken_by_all_who_are_left"
    ),
    "23 greptimedb: an advisory lock is kept": (
        "tests/store/test_statements.py::test_no_lock_and_no_setting_outlives_its_transaction"
    ),
    "24 authentik: migrating through pgbouncer": (
        "tests/store/test_pooler.py::test_a_transaction_pooler_is_refused_for_migrations_but_not_for_reading"
    ),
    "25 River, Oban: rows that vanish on promotion": (
        "tests/store/test_migrations.py::test_migrations_build_exactly_what_the_metadata_says"
    ),
    "27 Patroni: frozen past the lease, then back": "tests/cluster/test_trust.py::test_a_zombie_can_store_nothing",
    "29 River: channels without the schema": (
        "tests/outages/test_isolation.py::test_two_clusters_in_one_postgres_do_not_hear_each_other"
    ),
    "29 River: publications without the schema": (
        "tests/cluster/test_publications.py::test_two_schemas_of_one_database_do_not_hear_each_other"
    ),
    "31 graphile: a blocked listener pins xmin": (
        "tests/outages/test_isolation.py::test_a_line_that_does_not_read_pins_no_snapshot_for_long"
    ),
    "32 recall.ai: NOTIFY serialises the instance": (
        "tests/outages/test_isolation.py::test_a_storm_of_wake_ups_is_one_notify_at_a_time"
    ),
    "33 DBOS: a migration that was cut off": (
        "tests/store/test_migrations.py::test_a_run_that_is_cut_off_leaves_nothing_and_can_be_repeated"
    ),
}
UPDATED = "notifications/resources/updated"


@pytest.mark.parametrize("node_id", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_museum_is_shown_elsewhere(node_id: str) -> None:
    """By a test of that file that is always run, and that looks at what comes of it."""
    path, _, name = node_id.partition("::")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    test = getattr(module, name, None)
    assert inspect.isfunction(test)
    assert (name[:5], test.__module__) == ("test_", module.__name__)
    own, common = getattr(test, "pytestmark", []), getattr(module, "pytestmark", [])
    marks = {mark.name for mark in (*own, *(common if isinstance(common, list) else [common]))}
    assert marks.isdisjoint({"skip", "skipif", "xfail"})
    assert asserts(ast.parse(inspect.getsource(module)), name)


def asserts(module: ast.Module, name: str) -> bool:
    """Whether a function asserts something, or waits for it in vain, itself or in what it calls of its module."""
    functions = {
        node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    called, known = {name}, set[str]()
    while called:
        known |= called
        parts = [part for each in called if each in functions for part in ast.walk(functions[each])]
        if any(isinstance(part, ast.Assert) for part in parts):
            return True
        callees = [part.func for part in parts if isinstance(part, ast.Call)]
        named = {callee.id for callee in callees if isinstance(callee, ast.Name)}
        methods = {callee.attr for callee in callees if isinstance(callee, ast.Attribute)}
        if "raises" in methods or "eventually" in named:
            return True
        called = (named | methods) - known
    return False


def test_a_test_that_looks_at_nothing_shows_nothing() -> None:
    """The museum's own rule can fail."""
    module = ast.parse(
        "def test_a(): assert x\ndef test_b(): look()\ndef look(): assert x\ndef test_c(): do()\ndef test_d(): test_d()"
    )
    assert [asserts(module, f"test_{letter}") for letter in "abcde"] == [True, True, False, False, False]


async def test_museum_03_a_lower_number_never_commits_late_in_a_stream(
    database: str, ledger: Ledger, tables: Tables
) -> None:
    """Whoever stores the later of two events waits for the earlier one, so no reader can skip over it."""
    uris = [f"test://{number}" for number in range(6)]
    hand = await asyncpg.connect(database)
    try:
        async with cluster(database, ledger.server, 2, poll=60) as nodes, RawSession() as session:
            await session.open(nodes[0].url)
            standalone = await session.get(nodes[1].url)
            told = []
            for turn in range(0, len(uris), 2):
                async with hand.transaction():
                    await hand.fetch("select from pgmcp.streams where kind = 'standalone' for update")
                    told += [
                        asyncio.create_task(session.call_tool(node.url, "update", uris=[uri]))
                        for node, uri in zip(nodes, uris[turn:], strict=False)
                    ]
                    await eventually(lambda: Watcher(tables.connection).waiting("/* append */"), "an append waits")
            await asyncio.gather(*told)
            found = [(await standalone.message(UPDATED))["params"]["uri"] for _ in told]
            numbers = [int(str(event.id).partition(".")[2]) for event in standalone.seen if event.message]
    finally:
        await hand.close()
    assert sorted(found) == uris
    assert numbers == list(range(1, 7))


async def test_museum_04_the_line_is_tried_for_ever(
    database: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """solid_cable: the list of retries was exhausted, the listener gone, the process healthy."""
    monkeypatch.setattr(line_module, "REOPEN_SECONDS", tuple(seconds / 20 for seconds in line_module.REOPEN_SECONDS))
    async with (
        proxied(database) as (proxy, through),
        cluster(through, ledger.server, 2, poll=60, renew=0.1) as nodes,
        sessions(nodes, 2) as opened_sessions,
    ):
        lines = [node.incarnation.line for node in nodes]
        proxy.refusing = True
        proxy.cut_all()
        seen = proxy.connected
        await eventually(lambda: proxy.connected > seen + 100, "they go on trying")
        assert not any(line.up for line in lines)
        proxy.refusing = False
        await eventually(lambda: all(line.up for line in lines), "the lines are back")
        for number, session in enumerate(opened_sessions):
            await run(session, nodes[1 - number].url, str(number))
        assert sorted(ledger.ran) == ["0", "1"]


async def test_museum_05_what_is_pruned_between_wake_up_and_read_is_no_clean_end(
    database: str, ledger: Ledger, tables: Tables
) -> None:
    """socket.io: the row was gone when the notification was read, and the message with it."""
    async with cluster(database, ledger.server, 2, poll=60) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        log = nodes[1].incarnation.log
        read, pruned = log.read, asyncio.Event()

        async def late(cursor: Cursor) -> Page:
            await pruned.wait()
            return await read(cursor)

        log.read = late  # type: ignore[method-assign]  # it takes its time
        exchange = await session.request(nodes[1].url, "tools/call", {"name": "run", "arguments": {"text": "x"}})
        closed = "select count(*) from pgmcp.streams where kind = 'request' and closed and next_seq = 2 and id = $1"
        priming = await exchange.event()
        stream = UUID(str(priming.id).partition(".")[0])
        await eventually(lambda: tables.value(closed, stream), "the answer is stored")
        await tables.execute("delete from pgmcp.streams where id = $1", stream)
        pruned.set()
        events = await exchange.rest()
        assert exchange.error is None
        assert [(event.message, event.retry is not None) for event in events] == [(None, True)]  # "come back"
        for node in nodes:
            gone = await session.get(node.url, exchange.last_event_id)
            assert (gone.status, gone.body, gone.headers.get("content-type")) == (204, b"", None)
        assert ledger.ran == ["x"]


async def test_museum_09_a_slow_reader_is_let_go_and_can_resume(database: str, ledger: Ledger, tables: Tables) -> None:
    """litestar: an unbounded queue for each slow client. Here it is a cursor, and its exchange ends."""
    async with cluster(database, ledger.server, 2, write_timeout=0.3) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        async with unread_flood(nodes[1], session) as reader:
            first = (await reader.readuntil(b".0\r\n")).rpartition(b"id: ")[2].strip().decode()
            await eventually(lambda: ledger.ran == ["flood"], "the tool does not wait for the reader", 20)
            await eventually(lambda: not len(nodes[1].incarnation.open_streams), "the exchange ends")
        resumed = await session.get(nodes[0].url, first)
        assert (await resumed.response(1))["result"]["content"][0]["text"] == "done"
        steps = [message["params"]["progress"] for message in resumed.messages if "method" in message]
        assert steps == list(range(1, 81))


async def test_museum_21_a_limit_is_a_limit_also_for_sweeps_at_once(database: str, tables: Tables) -> None:
    """Oban: a subquery with LIMIT and SKIP LOCKED that the planner runs again takes more rows than the limit."""
    async with store(database) as node:
        session = await opened(node)
        await tables.execute(
            "insert into pgmcp.streams (id, session, kind, closed, closed_at) "
            "select gen_random_uuid(), $1, 'request', true, now() - interval '1 hour' from generate_series(1, 2000)",
            session.key,
        )
        await tables.execute(
            "insert into pgmcp.sessions (session_id, owner, transport, created_at) "
            "select 'old' || n, $1, 'streamable', now() - interval '30 days' from generate_series(1, 1000) n",
            node.node,
        )
        await tables.execute("analyze")
        times = (3600.0, 3600.0, 60.0, 1.0)
        ended = await asyncio.gather(*(node.database.ask("expire_sessions", *times, 100) for _ in range(8)))
        assert all(len(found) <= 100 for found in ended)
        assert len({row["id"] for found in ended for row in found}) == sum(map(len, ended)) > 0
        left = await tables.value("select count(*) from pgmcp.sessions where session_id like 'old%'")
        assert left == 1000 - sum(map(len, ended))
        pruned = await asyncio.gather(*(node.database.ask("prune_streams", 60.0, 86400.0, 500) for _ in range(3)))
        assert all(len(rows) <= 500 for rows in pruned)
        assert await tables.value("select count(*) from pgmcp.streams where closed") == 2000 - sum(map(len, pruned))


async def test_museum_21_eight_claimers_of_a_thousand_messages(database: str) -> None:
    async with store(database, max_in_flight=2000) as node:
        session = await opened(node)
        await asyncio.gather(*(node.inbox.accept([request(session, None)]) for _ in range(1000)))
        claims = await asyncio.gather(*(node.inbox.claim(session.ownership) for _ in range(8)))
        keys = [message.key for found in claims for message in found]
        assert len(keys) == len(set(keys)) == 1000


KEPT = "select name, setting, reset_val from pg_settings, pg_sleep(0.05) where name = any($1)"
"""Takes a while, so that each of several has a connection of its own."""


async def test_museum_28_no_setting_leaks_in_the_pool(database: str) -> None:
    """Hatchet: a statement's timeout stayed with the connection."""
    async with store(database, pool_size=3) as node:
        session = await opened(node)
        for _ in range(4):
            await node.inbox.accept([request(session, None)])
            await node.inbox.claim(session.ownership)
        names = ["lock_timeout", "statement_timeout", "synchronous_commit"]
        with own_sql():
            asked = await asyncio.gather(*(node.database.fetch(KEPT, names) for _ in range(3)))
        for rows in asked:
            assert {row["name"]: row["setting"] for row in rows} == {row["name"]: row["reset_val"] for row in rows}
            assert len(rows) == len(names)


LISTENING = "select (select count(*) from pg_listening_channels()) as channels, pg_backend_pid() as pid "


async def test_museum_30_nobody_listens_on_a_pool_connection(database: str, ledger: Ledger, tables: Tables) -> None:
    """pgqueuer: the pool's driver listened, and never reconnected. Only the line does, outside of the pool."""
    async with cluster(database, ledger.server, 1) as [node], sessions([node], 2) as opened:
        await asyncio.gather(*(run(session, node.url, f"{number}") for number, session in enumerate(opened)))

        async def all_of_them() -> bool:
            query = (
                "select pid from pg_stat_activity where datname = current_database() and application_name = 'pgmcp n1'"
            )
            pool = {row["pid"] for row in await tables.rows(query)}
            count = node.database.settings.pool_size
            asked = await asyncio.gather(
                *(node.database.fetch(LISTENING + "from pg_sleep(0.05)") for _ in range(count))
            )
            assert [row["channels"] for [row] in asked] == [0] * count
            return pool <= {row["pid"] for [row] in asked}

        with own_sql():
            await eventually(all_of_them, "each connection was asked")
    async with line_connection(database) as connection:
        assert (await connection.fetch(LISTENING))[0]["channels"] == 2
    folder = Path(pgmcp.__file__).parent
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if re.search(r"\.add_listener\(", path.read_text("utf-8"))
    }
    assert found == {"store/line.py"}
    assert Settings(database_url="postgresql://a/b", listen_url="postgresql://c/d").line_url == "postgresql://c/d"


async def test_museum_20_a_call_that_outlasts_the_lease_of_its_living_node_is_not_rescued(
    database: str, ledger: Ledger, tables: Tables
) -> None:
    """River and Oban rescue what is old; here age means nothing as long as the owner lives."""
    lease: dict[str, Any] = {"renew": 0.1, "deadline": 0.2, "trust": 0.8, "ttl": 1.0, "poll": 0.1}
    async with cluster(database, ledger.server, 3, **lease) as nodes, sessions(nodes, 1) as (session,):
        calling = asyncio.create_task(session.call_tool(nodes[1].url, "wait", text="long"))
        ticks = [node.incarnation.lease for node in nodes]
        started = ticks[0].ticked_at
        await eventually(lambda: all(lease.ticked_at > started + 2.5 for lease in ticks), "more than two leases pass")
        ledger.gate.set()
        await calling
        assert ledger.ran == ["long"]
        assert await tables.value("select count(*) from pgmcp.takeovers") == 0
        assert await tables.value("select max(epoch) from pgmcp.sessions") == 1


async def test_museum_26_nobody_ever_sees_an_empty_cluster(database: str, ledger: Ledger, tables: Tables) -> None:
    """JGroups: a table that is rewritten is empty for a moment, and everybody thinks that he is alone."""
    seen: list[int] = []
    done = asyncio.Event()

    async def look() -> None:
        while not done.is_set():
            seen.append(await tables.value("select count(*) from pgmcp.live_nodes"))

    async with cluster(database, ledger.server, 1, renew=0.1):
        looking = asyncio.create_task(look())
        for _ in range(4):
            async with cluster(database, ledger.server, 3, renew=0.1):
                pass
        done.set()
        await looking
    assert min(seen) >= 1
    assert max(seen) >= 3
    assert await tables.value("select count(*) from pgmcp.nodes where state = 'left'") == 13
