"""Whatever a DBA has set for role or database, the message path works, straight and through a pooler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgmcp.errors import DatabaseUnavailable
from pgmcp.store.schema import migrations
from pgmcp.types import ANONYMOUS, Cursor
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, cluster, everything
from tests.harness.pooler import pooler
from tests.harness.stores import HELD, IDS, Store, answer, line_connection, opened, own_sql, request, store

SETTINGS = {
    "repeatable read": {"default_transaction_isolation": "'repeatable read'"},
    "serializable": {"default_transaction_isolation": "serializable", "default_transaction_deferrable": "on"},
    "commits": {"synchronous_commit": "off"},
    "foreign keys": {"session_replication_role": "replica"},
    "limits": {"statement_timeout": "40", "lock_timeout": "1"},
    "rests": {"idle_in_transaction_session_timeout": "1", "idle_session_timeout": "300"},
    "names and rows": {"search_path": "public, nowhere, pg_catalog", "row_security": "off"},
    "formats": {
        "bytea_output": "escape",
        "standard_conforming_strings": "off",
        "datestyle": "'German, DMY'",
        "timezone": "'Asia/Kathmandu'",
        "extra_float_digits": "-15",
        "client_encoding": "latin1",
    },
    "plans": {"enable_indexscan": "off", "enable_nestloop": "off"},
}
ALL = {name: value for settings in reversed(SETTINGS.values()) for name, value in settings.items()}
PINNED = {
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    "session_replication_role": "origin",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "row_security": "off",
    "search_path": "pg_catalog, pg_temp",
}
BACKENDS = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
LOOK = "select name, pg_catalog.current_setting(name) as value from unnest($1::text[]) as n (name)"

Role = tuple[str, Callable[..., Awaitable[None]]]


@pytest.fixture
async def role(database: str, tables: Tables) -> AsyncIterator[Role]:
    """The address of the test's database for a role of its own, and what sets something for it."""
    name = f"role_{IDS.uuid().hex}"
    await tables.execute(f"create role {name} login superuser password 'its-own'")
    at = urlsplit(database)

    async def set_for_it(**settings: str) -> None:
        for setting, value in settings.items():
            await tables.execute(f"alter role {name} set {setting} = {value}")

    yield at._replace(netloc=f"{name}:its-own@{at.hostname}:{at.port}").geturl(), set_for_it
    await tables.execute(f"drop role {name}")


def pairs(rows: list[asyncpg.Record]) -> dict[str, str]:
    return {row["name"]: row["value"] for row in rows}


async def exchange(node: Store) -> None:
    """A session, a request, its claim, its answer, its events, and the session's end."""
    session = await opened(node)
    message = request(session)
    await node.inbox.accept([message])
    [claimed] = await node.inbox.claim(session.ownership)
    await node.log.append(answer(claimed))
    assert message.stream is not None
    page = await node.log.read(Cursor(message.stream, 1, 0))
    assert [event.message for event in page.events] == [b"answer"]
    await node.inbox.end(session.session_id, ANONYMOUS)


async def contended(tables: Tables, node: Store) -> None:
    """A claim waits for a stranger's lock of 50 ms, and gets through."""
    session = await opened(node)
    await node.inbox.accept([request(session)])
    hold = (
        f"do $$ begin perform from pgmcp.sessions where id = {session.key} for update; perform pg_sleep(0.05); end $$"
    )
    held = asyncio.create_task(tables.execute(hold))
    await asyncio.sleep(0)
    [claimed] = await node.inbox.claim(session.ownership)
    await held
    await node.log.append(answer(claimed))
    await node.inbox.end(session.session_id, ANONYMOUS)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("what", SETTINGS)
async def test_the_message_path_works_whatever_is_set(role: Role, tables: Tables, what: str) -> None:
    address, set_for_it = role
    await set_for_it(**SETTINGS[what])
    async with store(address) as node, asyncio.timeout(10):
        await asyncio.gather(*(exchange(node) for _ in range(3)))
        await contended(tables, node)
    assert {table: await tables.value(f"select count(*) from pgmcp.{table}") for table in HELD} == dict.fromkeys(
        HELD, 0
    )


async def test_pool_and_line_have_what_is_pinned(role: Role) -> None:
    address, set_for_it = role
    await set_for_it(**ALL)
    async with cluster(address, everything, 2) as nodes, RawSession() as session:
        await session.open(nodes[0].url, nodes[1].url)
        for turn, node in enumerate([*nodes, *nodes], 1):
            assert (await session.call_tool(node.url, "count"))["structuredContent"] == {"result": turn}
        with own_sql():
            for node in nodes:
                assert pairs(await node.database.fetch(LOOK, list(PINNED))) == PINNED
                [found] = await node.database.fetch("show enable_indexscan")
                assert found["enable_indexscan"] == "on"
    async with line_connection(address) as connection:
        assert pairs(await connection.fetch(LOOK, list(PINNED))) == PINNED


async def test_a_pooler_s_strangers_see_nothing_of_it(role: Role) -> None:
    """Statements have a transaction of their own, which sets what the backends lack; the backends keep nothing."""
    address, set_for_it = role
    await set_for_it(default_transaction_isolation="serializable", synchronous_commit="off")
    with pooler(address) as through:
        async with store(through, listen_url=address) as node:
            with own_sql():
                seen = await node.database.fetch(LOOK, ["transaction_isolation", "synchronous_commit"])
            assert pairs(seen) == {"transaction_isolation": "read committed", "synchronous_commit": "on"}
            await exchange(node)
            with own_sql(), pytest.raises(asyncpg.DivisionByZeroError):
                await node.database.fetch("select 1 / $1::int", 0)
            await exchange(node)
            stranger = await asyncpg.connect(through, statement_cache_size=0)
            assert await stranger.fetchval("show transaction_isolation") == "serializable"
            assert await stranger.fetchval("show synchronous_commit") == "off"
            await stranger.close()


@pytest.mark.parametrize("level", ["local", "remote_write", "remote_apply"])
async def test_what_a_dba_chose_for_commits_stays(role: Role, level: str) -> None:
    address, set_for_it = role
    await set_for_it(synchronous_commit=level)
    async with store(address) as node:
        with own_sql():
            [found] = await node.database.fetch("show synchronous_commit")
        assert found["synchronous_commit"] == level


@pytest.mark.usefixtures("either_way")
async def test_a_role_that_may_not_turn_foreign_keys_on_is_refused(role: Role, tables: Tables) -> None:
    address, set_for_it = role
    await set_for_it(session_replication_role="replica")
    await tables.execute(f"alter role {urlsplit(address).username} nosuperuser")
    with pytest.raises(DatabaseUnavailable, match="reset session_replication_role"):
        async with store(address):
            pass


async def test_a_change_behind_the_pooler_is_noticed(
    role: Role, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, set_for_it = role
    monkeypatch.setattr("pgmcp.store.connection.settings.LOOK_AGAIN_SECONDS", 0.0)
    with pooler(address) as through:
        async with store(through, listen_url=address) as node:
            await exchange(node)
            await set_for_it(default_transaction_isolation="serializable")
            await tables.value(f"select count(pg_terminate_backend(pid)) {BACKENDS}")
            await exchange(node)
            with own_sql():
                seen = await node.database.fetch(LOOK, ["transaction_isolation"])
            assert pairs(seen) == {"transaction_isolation": "read committed"}


async def test_migrations_do_not_mind(empty_database: str) -> None:
    admin = await asyncpg.connect(empty_database)
    name = urlsplit(empty_database).path.strip("/")
    for setting, value in (ALL | {"idle_in_transaction_session_timeout": "300"}).items():
        await admin.execute(f"alter database {name} set {setting} = {value}")
    await admin.close()
    await asyncio.to_thread(migrations.upgrade, empty_database, "pgmcp")
    assert await asyncio.to_thread(migrations.check, empty_database, "pgmcp") == []
