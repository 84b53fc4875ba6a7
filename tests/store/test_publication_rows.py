"""Publications on PostgreSQL: what waits counts once, what commits late is not passed over, what is old goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import pytest

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable
from pgmcp.settings import Settings
from pgmcp.store import publications
from pgmcp.store.notifier import channel
from pgmcp.store.publications import TablePublications, publish_from_outside
from pgmcp.store.retention import Retention
from pgmcp.store.schema import migrations
from pgmcp.store.schema.tables import PUBLISHING
from pgmcp.types import PUBLICATIONS_SECONDS, PUBLISHED, Change, Horizon, Publication
from tests.harness.stores import IDS, Store, store

TOOLS = Publication(Change.TOOLS)
COUNT = "select count(*) from pgmcp.publications"


def updated(uri: object) -> Publication:
    return Publication(Change.UPDATED, str(uri))


@pytest.fixture
async def node(database: str) -> AsyncIterator[Store]:
    async with store(database, hold=5) as made:
        yield made


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database, timeout=10)
    yield connection
    await connection.close()


def table(node: Store) -> TablePublications:
    return TablePublications(node.database, Clock(), IDS)


async def said(of: TablePublications, since: Horizon | None) -> tuple[list[str], Horizon]:
    batch = await of.read(since)
    return [each.uri or each.change for each in batch.publications], batch.horizon


class Gate:
    """Holds statements back until the test lets them go."""

    def __init__(self, node: Store) -> None:
        self.free, self.sent = asyncio.Event(), list[int]()
        self._fetch, node.database.fetch = node.database.fetch, self.fetch  # type: ignore[method-assign]

    async def fetch(self, name: str, *args: object, **more: Any) -> list[asyncpg.Record]:
        if name == "publish":
            assert isinstance(args[0], Sequence)
            self.sent.append(len(args[0]))
            await self.free.wait()
        return await self._fetch(name, *args, **more)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_waits_counts_once_and_what_is_under_way_does_not(node: Store, hand: asyncpg.Connection) -> None:
    gate, of = Gate(node), table(node)
    publishing = [asyncio.create_task(of.publish(TOOLS))]
    await turns()
    assert gate.sent == [1]
    publishing += [asyncio.create_task(of.publish(each)) for each in [TOOLS, updated(1), TOOLS, updated(1)] * 50]
    await turns()
    assert gate.sent == [1]
    publishing[1].cancel()  # one that waits with others takes nothing from them
    gate.free.set()
    await asyncio.gather(*publishing, return_exceptions=True)
    assert gate.sent == [1, 2]
    assert await hand.fetchval(COUNT) == 3
    await of.publish(TOOLS)
    assert await hand.fetchval(COUNT) == 4


async def test_what_waits_is_bounded(node: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publications, "WAITING", 10)
    gate, of = Gate(node), table(node)
    first = asyncio.create_task(of.publish(TOOLS))
    await turns()
    waiting = [asyncio.create_task(of.publish(updated(n))) for n in range(10)]
    await turns()
    with pytest.raises(DatabaseUnavailable, match="publish again"):
        await of.publish(updated("one too many"))
    same = asyncio.create_task(of.publish(updated(3)))
    gate.free.set()
    await asyncio.gather(first, *waiting, same)
    await of.publish(updated("room again"))


async def test_an_outage_ends_in_an_error_and_leaves_nothing_behind(database: str) -> None:
    async with store(database, hold=0.2) as node:
        gate, of = Gate(node), table(node)
        outcomes = await asyncio.gather(*(of.publish(updated(n)) for n in range(3)), return_exceptions=True)
        assert [type(each) for each in outcomes] == [DatabaseUnavailable] * 3
        assert of.waiting == 0
        gate.free.set()
        await of.publish(TOOLS)


async def test_what_commits_late_is_read_and_what_is_rolled_back_is_not(node: Store, database: str) -> None:
    of = table(node)
    _, horizon = await said(of, None)
    hands = [await asyncpg.connect(database) for _ in range(3)]
    transactions = [connection.transaction() for connection in hands]
    for number, (connection, transaction) in enumerate(zip(hands, transactions, strict=True)):
        await transaction.start()
        await connection.execute("select pgmcp.publish_resource_updated($1)", f"late {number}")
    await of.publish(updated("between"))
    found, horizon = await said(of, horizon)
    assert found == ["between"]
    await transactions[2].commit()
    await transactions[1].rollback()
    found, horizon = await said(of, horizon)
    assert found == ["late 2"]
    await of.publish(updated("after"))
    await transactions[0].commit()
    found, horizon = await said(of, horizon)
    assert found == ["late 0", "after"]
    assert (await said(of, horizon))[0] == []
    for connection in hands:
        await connection.close()


async def test_rows_of_another_servers_dump_are_neither_read_for_ever_nor_kept(
    node: Store, hand: asyncpg.Connection
) -> None:
    """Their transactions are beyond all that this server has had."""
    of = table(node)
    _, horizon = await said(of, None)
    await hand.execute(
        "insert into pgmcp.publications (kind, uri, xact, published_at) "
        "values ('resource_updated', 'old', 1000000000000, clock_timestamp() - interval '1 hour')"
    )
    assert (await said(of, horizon))[0] == []
    await Retention(node.database, IDS).prune()
    assert await hand.fetchval(COUNT) == 0


OLD = "update pgmcp.publications set published_at = published_at - interval '1 hour'"


class Later(Clock):
    """A clock that a test moves forward."""

    def __init__(self) -> None:
        self.shift = 0.0

    def boottime(self) -> float:
        return super().boottime() + self.shift


@pytest.fixture
def later(node: Store) -> Later:
    """The time of the node's retention."""
    node.database.clock = Later()
    return node.database.clock


async def test_what_is_old_goes_but_the_newest_change_of_each_list(
    node: Store, hand: asyncpg.Connection, later: Later
) -> None:
    of, retention = table(node), Retention(node.database, IDS)
    for publication in (TOOLS, updated(1), Publication(Change.PROMPTS), TOOLS):
        await of.publish(publication)
    await hand.execute(OLD)
    await of.publish(updated(2))
    await retention.prune()
    assert await hand.fetchval(COUNT) == 5, "what may be new to others stays"
    later.shift += PUBLICATIONS_SECONDS + 1
    await retention.prune()
    left = await hand.fetch("select kind, uri from pgmcp.publications order by xact")
    assert [(row["kind"], row["uri"]) for row in left] == [
        ("prompts_list_changed", None), ("tools_list_changed", None), ("resource_updated", "2")
    ]  # fmt: skip


async def test_what_a_long_transaction_published_is_kept_from_its_commit_on(
    node: Store, database: str, later: Later
) -> None:
    """As long as any other: a node that was deaf for a while finds it, too."""
    of, retention, other = table(node), Retention(node.database, IDS), await asyncpg.connect(database)
    _, horizon = await said(of, None)
    async with other.transaction():
        await other.execute("select pgmcp.publish_resource_updated('late')")
        await other.execute(OLD)
        await retention.prune()
        later.shift += PUBLICATIONS_SECONDS + 1
        await retention.prune()
    for _ in range(3):
        later.shift += PUBLICATIONS_SECONDS / 4
        await retention.prune()
    assert (await said(of, horizon))[0] == ["late"]
    later.shift += PUBLICATIONS_SECONDS / 2
    await retention.prune()
    assert await other.fetchval(COUNT) == 0
    await other.close()


@pytest.mark.parametrize("schema", ["pgmcp", "user"])  # a reserved word of SQL
async def test_the_functions_notify_the_schemas_own_channel(empty_database: str, schema: str) -> None:
    await asyncio.to_thread(migrations.upgrade, empty_database, schema)
    connection, other = await asyncpg.connect(empty_database), await asyncpg.connect(empty_database)
    heard: list[object] = []
    await connection.add_listener(channel(schema, None), lambda *args: heard.append(args[3]))
    for function in PUBLISHING:
        call = function.replace("(text)", "('a://1')")
        await other.execute(f'select "{schema}".{call}')
    await publish_from_outside(Settings(database_url=empty_database, schema_name=schema), [TOOLS, updated(2)])
    await connection.execute("select 1")
    assert heard == [PUBLISHED] * 5
    rows = await other.fetch(f'select kind, uri from "{schema}".publications order by xact, published_at')
    assert [row["uri"] or row["kind"] for row in rows] == [
        "a://1", "tools_list_changed", "prompts_list_changed", "resources_list_changed", "tools_list_changed", "2"
    ]  # fmt: skip
    await connection.close()
    await other.close()


async def test_only_who_was_allowed_to_publishes_and_nobodys_search_path_matters(
    database: str, hand: asyncpg.Connection
) -> None:
    server, _, name = database.rpartition("/")
    role = f"role_of_{name}"
    await hand.execute(f'create role "{role}" login password \'secret\'; grant usage on schema pgmcp to "{role}"')
    stranger = await asyncpg.connect(f"postgresql://{role}:secret@{server.rpartition('@')[2]}/{name}")
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await stranger.execute("select pgmcp.publish_tools_list_changed()")
        await hand.execute(f'grant execute on all functions in schema pgmcp to "{role}"')
        await stranger.execute(
            "create function pg_temp.pg_notify(text, text) returns void language sql as 'select 1/0'"
        )
        await stranger.execute("create temp table publications (kind text, uri text)")
        await stranger.execute("set search_path = pg_temp, pg_catalog")
        await stranger.execute("select pgmcp.publish_tools_list_changed()")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await stranger.execute("insert into pgmcp.publications (kind) values ('tools_list_changed')")
    finally:
        await stranger.close()
        await hand.execute(f'drop owned by "{role}"; drop role "{role}"')
    assert await hand.fetchval(COUNT) == 1


@pytest.mark.parametrize("uri", [None, "", "x" * 8193])
async def test_sql_refuses_what_python_refuses(hand: asyncpg.Connection, uri: str | None) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await hand.execute("select pgmcp.publish_resource_updated($1)", uri)
