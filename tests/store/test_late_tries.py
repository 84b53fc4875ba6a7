"""A first try may arrive late: after its repeat, and after newer writes. Then it changes nothing."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import asyncpg
import pytest

from pgmcp.errors import PgmcpError
from pgmcp.store.statements import names, statement
from pgmcp.types import (
    ANONYMOUS,
    Attachment,
    Claimed,
    Cursor,
    Established,
    JournalEntry,
    NewSession,
    NodeId,
    Ownership,
    StreamId,
)
from tests.harness.proxy import Cut, Proxy, proxied
from tests.harness.stores import IDS, Session, Store, answer, opened, outcome, request, store

TABLES = "select tablename from pg_tables where schemaname = 'pgmcp' order by tablename"
NODE = (
    "insert into pgmcp.nodes (node_id, name, address, state, expires_at, version, schema_revision) "
    "values ($1, 'node', '', $2, clock_timestamp() + interval '1 hour', '1', '1')"
)


@dataclass
class Scene:
    """A node whose connections go through the proxy, another one, a session with a claimed request, and a hand."""

    proxy: Proxy
    node: Store
    other: Store
    session: Session
    claimed: Claimed
    hand: asyncpg.Connection

    async def late(self, name: str, call: Awaitable[Any]) -> Any:
        """Run a call the first try of whose statement is on its way until the end of the test."""
        self.proxy.cut(name, Cut.LATE)
        result = await outcome(call)
        assert self.proxy.pending == []
        assert not isinstance(result, PgmcpError), result
        return result

    async def held(self) -> dict[str, list[str]]:
        """Everything that is in the tables."""
        tables = [row["tablename"] for row in await self.hand.fetch(TABLES)]
        return {
            table: [row[0] for row in await self.hand.fetch(f"select t::text from pgmcp.{table} t order by 1")]
            for table in tables
        }

    async def bury(self) -> None:
        await self.hand.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", self.node.node)

    async def raw(self, name: str, *args: object) -> None:
        """Send a statement through the proxy until it gets through."""
        await self.node.database.persist(name, *args, patience=5.0)


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    hand = await asyncpg.connect(database, timeout=10)
    try:
        async with proxied(database) as (proxy, address), store(address) as node, store(database) as other:
            for each in (node, other):
                await hand.execute(NODE, each.node, "ready")
            session = await opened(node)
            await node.inbox.accept([request(session)])
            (claimed,) = await node.inbox.claim(session.ownership)
            yield Scene(proxy, node, other, session, claimed, hand)
    finally:
        await hand.close()


# Each case: a write whose first try is on its way, and what comes after it.


async def accept(scene: Scene) -> None:
    message = request(scene.session, "2")
    await scene.late("accept", scene.node.inbox.accept([message]))
    claimed = {each.key: each for each in await scene.node.inbox.claim(scene.session.ownership)}
    await scene.node.log.append(answer(claimed[message.key]))


async def append(scene: Scene) -> None:
    first = replace(answer(scene.claimed), finishes=None, outcome=None)
    await scene.late("append", scene.node.log.append(first))
    await scene.node.log.append(answer(scene.claimed, 2))


async def attach(scene: Scene) -> None:
    """The stalled try must not take the stream from a newer sink."""
    call = scene.node.log.attach(scene.session.session_id, ANONYMOUS, scene.claimed.stream)
    await scene.late("attach", call)
    newer = await scene.other.log.attach(scene.session.session_id, ANONYMOUS, scene.claimed.stream)
    assert isinstance(newer, Attachment)


async def attach_again(scene: Scene) -> None:
    """Nor from its own repeat, which is the one that reads."""
    call = scene.node.log.attach(scene.session.session_id, ANONYMOUS, scene.claimed.stream)
    attached = await scene.late("attach", call)
    assert (await scene.node.log.read(Cursor(attached.stream, attached.sink_epoch, 0))).attached


async def drop_sink(scene: Scene) -> None:
    await scene.late("drop_sink", scene.node.log.drop_sink(scene.session.ownership, scene.claimed.stream))
    await scene.other.log.attach(scene.session.session_id, ANONYMOUS, scene.claimed.stream)


async def release(scene: Scene) -> None:
    assert scene.claimed.stream is not None
    await scene.late("release", scene.node.log.release(Cursor(scene.claimed.stream, 1, 0)))
    await scene.node.log.attach(scene.session.session_id, ANONYMOUS, scene.claimed.stream)


async def free_request_id(scene: Scene) -> None:
    await scene.node.log.append(answer(scene.claimed))
    await scene.hand.execute("update pgmcp.streams set sink = null")
    await scene.late("free_request_id", scene.node.inbox.accept([request(scene.session, "1", b'{"other":1}')]))


async def claim(scene: Scene) -> None:
    await scene.node.inbox.accept([request(scene.session, "2")])
    await scene.late("claim", scene.node.inbox.claim(scene.session.ownership))
    await scene.node.inbox.accept([request(scene.session, "3")])
    assert len(await scene.node.inbox.claim(scene.session.ownership)) == 1


async def put_back(scene: Scene) -> None:
    """A claim that came to nobody is given up and taken again: now it runs."""
    claims = {scene.claimed.key: await scene.hand.fetchval("select claim from pgmcp.requests")}
    await scene.late("put_back", scene.node.inbox.put_back(scene.session.ownership, claims))
    assert len(await scene.node.inbox.claim(scene.session.ownership)) == 1


async def keep_claims(scene: Scene) -> None:
    """In a new term one request is kept; what waited again has been claimed by now."""
    await scene.node.inbox.accept([request(scene.session, "2")])
    await scene.node.inbox.claim(scene.session.ownership)
    await scene.hand.execute("update pgmcp.sessions set epoch = epoch + 1000000")
    now = replace(scene.session.ownership, epoch=scene.session.ownership.epoch + 1_000_000)
    await scene.late("keep_claims", scene.node.inbox.keep_claims([now], [scene.claimed.key]))
    assert len(await scene.node.inbox.claim(now)) == 1


async def establish(scene: Scene) -> None:
    inbox, own = scene.node.inbox, scene.session.ownership
    await scene.late("establish", inbox.establish(own, Established("2025-06-18", "first", "1", b"{}"), 1))
    await inbox.establish(own, Established("2025-11-25", "second", "2", b"{}"), 2)


async def write_journal(scene: Scene) -> None:
    inbox, own = scene.node.inbox, scene.session.ownership
    await scene.late("write_journal", inbox.write_journal(own, JournalEntry("state", "k", b"one"), 1))
    await inbox.write_journal(own, JournalEntry("state", "k", b"two"), 2)


async def write_and_forget(scene: Scene) -> None:
    """What was forgotten is not remembered again."""
    inbox, own = scene.node.inbox, scene.session.ownership
    await scene.late("write_journal", inbox.write_journal(own, JournalEntry("state", "k", b"one"), 1))
    await inbox.write_journal(own, JournalEntry("state", "k"), 2)


async def forget_and_write(scene: Scene) -> None:
    """What was written anew is not forgotten."""
    inbox, own = scene.node.inbox, scene.session.ownership
    await inbox.write_journal(own, JournalEntry("state", "k", b"one"), 1)
    await scene.late("write_journal", inbox.write_journal(own, JournalEntry("state", "k"), 2))
    await inbox.write_journal(own, JournalEntry("state", "k", b"two"), 3)


async def open_session(scene: Scene) -> None:
    """A session that its client has ended does not come back."""
    new = NewSession(IDS.token(), ANONYMOUS, "streamable", StreamId(IDS.uuid()))
    ownership = await scene.late("open_session", scene.node.inbox.open_session(new))
    await scene.other.inbox.end(new.session_id, ANONYMOUS)
    assert ownership not in await scene.node.inbox.owned()


async def end_session(scene: Scene) -> None:
    await scene.late("end_session", scene.node.inbox.end(scene.session.session_id, ANONYMOUS))
    await opened(scene.other)


async def end_owned_session(scene: Scene) -> None:
    await scene.late("end_owned_session", scene.node.inbox.end_owned(scene.session.ownership))
    await opened(scene.node)


async def taken(scene: Scene, by: Store) -> Ownership:
    facts = await by.takeovers.take(scene.session.key)
    assert facts is not None
    return Ownership(facts.session, facts.epoch)


async def take_session(scene: Scene) -> None:
    """The one that took it has given it on meanwhile."""
    await scene.hand.execute("update pgmcp.sessions set owner = $1", IDS.uuid())
    await scene.late("take_session", scene.node.takeovers.take(scene.session.key))
    mine = replace(scene.session.ownership, epoch=2)
    assert await scene.node.takeovers.hand_over(mine, scene.other.node) is not None


async def hand_over(scene: Scene) -> None:
    moved = await scene.late("hand_over", scene.node.takeovers.hand_over(scene.session.ownership, scene.other.node))
    assert await scene.other.takeovers.hand_over(moved, scene.node.node) is not None


async def adopt(scene: Scene) -> None:
    """What was adopted has been adopted once more, with one more run."""
    own = scene.session.ownership
    await scene.late("adopt", scene.node.takeovers.adopt(own, [(scene.claimed.key, 2)]))
    await scene.node.takeovers.adopt(own, [(scene.claimed.key, 3)])


async def end_restore(scene: Scene) -> None:
    """The server has exported anew."""
    own = scene.session.ownership
    left = await scene.node.takeovers.inherit(own)
    await scene.late("end_restore", scene.node.takeovers.restored(own, left))
    await scene.node.inbox.write_journal(own, JournalEntry("export", "", b"7"), 1)


async def end_restore_of_an_earlier_attempt(scene: Scene) -> None:
    own = scene.session.ownership
    left = await scene.node.takeovers.inherit(own)
    await scene.late("end_restore", scene.node.takeovers.restored(own, left))
    for _ in range(2):
        await scene.node.takeovers.inherit(own)


async def set_state(scene: Scene) -> None:
    """A node that drains does not become ready again."""
    await scene.late("set_state", scene.raw("set_state", scene.node.node, "ready"))
    await scene.node.database.fetch("set_state", scene.node.node, "draining")


async def drain_node(scene: Scene) -> None:
    await scene.late("drain_node", scene.raw("drain_node", scene.node.node))
    await scene.node.database.fetch("set_state", scene.node.node, "left")


async def join(scene: Scene) -> None:
    node = NodeId(IDS.uuid())
    row = (node, "node", "", 60.0, "1", "0001", "0001", "9999", "server")
    await scene.late("join", scene.raw("join", *row))
    await scene.hand.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", node)


async def publish(scene: Scene) -> None:
    await scene.late("publish", scene.raw("publish", [IDS.uuid()], ["tools_list_changed"], [None]))


async def spend_state(scene: Scene) -> None:
    await scene.late("spend_state", scene.raw("spend_state", b"state", IDS.uuid(), 60.0))


async def add_key(scene: Scene) -> None:
    await scene.late("add_key", scene.raw("add_key", "context", b"key", None, 3600.0))


async def wrap_keys(scene: Scene) -> None:
    await scene.node.database.fetch("add_key", "context", b"key", None, 3600.0)
    key = await scene.hand.fetchval("select id from pgmcp.secrets")
    await scene.late("wrap_keys", scene.raw("wrap_keys", [key], [b"key"], [b"wrapped"], b"1"))
    await scene.node.database.fetch("wrap_keys", [key], [b"wrapped"], [b"anew"], b"2")


Case = Callable[[Scene], Coroutine[Any, Any, None]]
CASES: dict[str, list[Case]] = {
    "accept": [accept],
    "add_key": [add_key],
    "adopt": [adopt],
    "append": [append],
    "attach": [attach, attach_again],
    "claim": [claim],
    "drain_node": [drain_node],
    "drop_sink": [drop_sink],
    "end_owned_session": [end_owned_session],
    "end_restore": [end_restore, end_restore_of_an_earlier_attempt],
    "end_session": [end_session],
    "establish": [establish],
    "free_request_id": [free_request_id],
    "hand_over": [hand_over],
    "join": [join],
    "keep_claims": [keep_claims],
    "open_session": [open_session],
    "publish": [publish],
    "put_back": [put_back],
    "release": [release],
    "set_state": [set_state],
    "spend_state": [spend_state],
    "take_session": [take_session],
    "wrap_keys": [wrap_keys],
    "write_journal": [write_journal, write_and_forget, forget_and_write],
}

JUDGES = "it judges what is there when it arrives, in database time, and is never repeated for its own sake"
HARMLESS: dict[str, str] = {
    "begin_history": "it fills in the mark of a row that has none",
    "begin_restore": "one attempt more is counted, until the next restore succeeds",
    "announce_term": "compare-and-set on the history's id, which no two terms share",
    "begin_term": "compare-and-set on the history's id, which no two terms share",
    "move_to_term": "it moves what is below the term, and nothing is below it a second time",
    "condemn": JUDGES,
    "drop_dead_sinks": JUDGES,
    "drop_keys": JUDGES,
    "expire_sessions": JUDGES,
    "make_room": "only where there is no room: one more unused session makes some",
    "make_room_of_caller": "only where there is no room: one more unused session makes some",
    "no_older": "what the schema needs only grows, and whoever asked for it runs already",
    "note_maker": "it fills in what nobody has filled in",
    "publish_and_notify": "it is sent once, on a connection of its own",
    "rename_cluster": "it is sent once, by an operator, in a transaction that holds the lock",
    "renew": "it is sent on one connection, in order; on the pool a late one prolongs a lease by a lease at most",
    "take_orphans": JUDGES,
    "touch_sessions": "a session counts as used a little longer",
    "use_session": "a session counts as used a little longer",
    **{name: JUDGES for name in names() if name.startswith("prune_")},
}
WRITES = re.compile(r"\b(insert into|update|delete from) \"pgmcp\"\.")


def test_every_write_has_a_case_or_a_reason() -> None:
    writes = {name for name in names() if WRITES.search(re.sub(r"--.*", "", statement(name, "pgmcp")))}
    assert writes <= CASES.keys() | HARMLESS.keys()
    assert CASES.keys() <= writes
    assert not CASES.keys() & HARMLESS.keys()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.__name__) for each in CASES.values() for case in each])
async def test_a_try_that_arrives_late_changes_nothing(scene: Scene, case: Case) -> None:
    await case(scene)
    before = await scene.held()
    await scene.proxy.deliver()
    assert await scene.held() == before


async def test_the_proxy_delivers_late(scene: Scene) -> None:
    """The control: what is on its way is not there before it is delivered, and is there afterwards."""
    scene.proxy.cut("set_state", Cut.LATE)
    before = await scene.held()
    with pytest.raises((OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
        await scene.node.database.fetch("set_state", scene.node.node, "draining")
    assert await scene.held() == before
    await scene.proxy.deliver()
    assert await scene.held() != before
