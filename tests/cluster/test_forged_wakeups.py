"""Wake-ups that somebody made up: PostgreSQL has no rights on channels, so they only ever cause a look."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgmcp.store import line as line_module
from pgmcp.store.notifier import channel
from pgmcp.types import NodeId
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, cluster, everything, owner_of, tables_of
from tests.harness.waiting import eventually


@contextlib.asynccontextmanager
async def stranger(database: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody who may connect to the database, and nothing else."""
    name = f"stranger_{secrets.token_hex(4)}"
    async with tables_of(database) as tables:
        await tables.execute(f"create role {name} login password 'x'")
        try:
            at = urlsplit(database)
            hand = await asyncpg.connect(at._replace(netloc=f"{name}:x@{at.hostname}:{at.port}").geturl())
            try:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await hand.fetch("select from pgmcp.nodes")
                yield hand
            finally:
                await hand.close()
        finally:
            await tables.execute(f"drop role {name}")


async def say(hand: asyncpg.Connection, payload: str, node: NodeId | None = None) -> None:
    await hand.execute("select pg_notify($1, $2)", channel("pgmcp", node), payload)


async def heard(node: RunningNode, hand: asyncpg.Connection) -> None:
    """Whatever was said before was heard, and looked at."""
    junk = node.incarnation.junk
    await say(hand, "?", node.incarnation.node_id)
    await eventually(lambda: node.incarnation.junk > junk, "it was heard")
    await eventually(lambda: not node.incarnation.reported_changes.wanted, "it is looked at")
    await asyncio.sleep(0.1)


async def begun(session: RawSession, node: RunningNode) -> RawExchange:
    """A call with effects that runs for a while."""
    params = {"name": "slow", "arguments": {"seconds": 1.5, "steps": 15}, "_meta": {"progressToken": 1}}
    call = await session.request(node.url, "tools/call", params)
    await call.message("notifications/progress")
    return call


@pytest.mark.parametrize("word", ["e{key}", "h{key}.9", "h{key}.1", "e{key},e1,e2,e3,o,p", "*", "o,p"])
@pytest.mark.parametrize("everybody", [True, False], ids=["to all", "to the owner"])
async def test_a_call_goes_on_whatever_is_made_up(database: str, word: str, everybody: bool) -> None:
    async with (
        cluster(database, everything, 2, poll=30) as nodes,
        stranger(database) as hand,
        RawSession() as session,
        tables_of(database) as tables,
    ):
        await session.open(nodes[0].url)
        call = await begun(session, nodes[1])
        key = await tables.value("select id from pgmcp.sessions")
        actor = owner_of(nodes, key).actors[key]
        for _ in range(3):
            for node in nodes:
                await say(hand, word.format(key=key), None if everybody else node.incarnation.node_id)
        for node in nodes:
            await heard(node, hand)
        answer = await call.response(1)
        assert "15 steps" in answer["result"]["content"][0]["text"]
        assert owner_of(nodes, key).actors[key] is actor
        await session.call(nodes[1].url, "ping")


async def test_an_end_that_the_tables_know_is_believed(database: str) -> None:
    """Its own node dies before it tells anybody; somebody else says it."""
    async with (
        cluster(database, everything, 2, poll=30) as nodes,
        RawSession() as session,
        tables_of(database) as tables,
    ):
        await session.open(nodes[0].url)
        stream = await session.get(nodes[1].url)
        key = await tables.value("delete from pgmcp.sessions returning id")
        async with stranger(database) as hand:
            await say(hand, f"e{key}")
            await eventually(lambda: nodes[0].incarnation.host.sessions == 0, "the actor is gone")
            await stream.rest(timeout=5)


async def test_junk_is_counted_and_harms_nobody(database: str) -> None:
    trouble: list[dict[str, Any]] = []

    def note(_: object, context: dict[str, Any]) -> None:
        trouble.append(context)

    asyncio.get_running_loop().set_exception_handler(note)
    words = [f"i{2**63}", f"e{10**30}", "i" + "9" * 5000, f"h{2**63}.1", f"h1.{2**70}", "s" + "0" * 31, "", "\x7f", "x"]
    async with cluster(database, everything, 1) as (node,), stranger(database) as hand, RawSession() as session:
        await session.open(node.url)
        await say(hand, f"i{10**15},e{2**63 - 1},h{2**63 - 1}.{2**63 - 1}", node.incarnation.node_id)
        for word in words:
            await say(hand, word)
            await say(hand, word, node.incarnation.node_id)
        await eventually(lambda: node.incarnation.junk >= 2 * len(words), "all of it was heard")
        await heard(node, hand)
        await session.call(node.url, "ping")
        assert not trouble
        assert not node.node.faults.counts


async def test_a_flood_costs_a_bounded_number_of_looks(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read for long: the node polls then, until it is over."""
    monkeypatch.setattr(line_module, "QUIET_SECONDS", 2.0)
    asked = Counter[str]()
    async with cluster(database, everything, 1) as (node,), stranger(database) as hand, RawSession() as session:
        await session.open(node.url)
        incarnation, fetch = node.incarnation, node.database.fetch

        async def counting(name: str, *args: object, **more: Any) -> Any:
            asked[name] += 1
            return await fetch(name, *args, **more)

        monkeypatch.setattr(node.database, "fetch", counting)
        begun = asyncio.get_running_loop().time()
        flood = asyncio.create_task(flooding(hand))
        try:
            await eventually(lambda: incarnation.line.deaf, "it does not listen any more")
            for _ in range(5):
                await session.call(node.url, "ping")
        finally:
            flood.cancel()
            await asyncio.wait({flood})
        took = asyncio.get_running_loop().time() - begun
        assert all(asked[name] <= 20 + 25 * took for name in ("owned", "owners", "unclaimed", "take_orphans")), asked
        await eventually(lambda: not incarnation.line.deaf, "it listens again")
        assert node.incarnation is incarnation
        assert incarnation.line.dropped > 100


async def test_calls_over_another_node_go_on_beside_a_flood(database: str) -> None:
    """Polls as rare as they are here would leave each of them without an answer."""
    async with (
        cluster(database, everything, 2, poll=60) as nodes,
        stranger(database) as hand,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        flood = asyncio.create_task(flooding(hand))
        try:
            await eventually(lambda: all(node.incarnation.line.deaf for node in nodes), "nobody listens any more")
            for _ in range(5):
                await session.call(nodes[1].url, "ping")
        finally:
            flood.cancel()
            await asyncio.wait({flood})


async def flooding(hand: asyncpg.Connection) -> None:
    while True:
        await hand.execute(
            "select pg_notify($1, case n % 5 when 0 then '*' when 1 then 'o,' || n when 2 then 'p,' || n "
            "else 'e' || n || repeat(',e1,e2', 100) end) from generate_series(1, 3000) n",
            channel("pgmcp", None),
        )
