"""Deaths and changes of owner, statement by statement, on real rows and real locks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgmcp.errors import Fenced
from pgmcp.store.retention import Retention
from pgmcp.store.takeover import TableTakeovers
from pgmcp.types import ANONYMOUS, Candidate, JournalEntry, NodeId, SessionFacts
from tests.harness.stores import (
    IDS,
    Session,
    Store,
    Watcher,
    answer,
    check_streams,
    opened,
    outcome,
    request,
    store,
)

NOBODY = 2**22  # no process has this id: the kernel's largest is one less


async def joined(connection: asyncpg.Connection, node: NodeId, **values: Any) -> None:
    """Write a node's row; times are seconds from now."""
    row = {"state": "ready", "expires": 10.0, "renewed": 0.0, "pid": None, "started": None, "name": "n"} | values
    await connection.execute(
        "insert into pgmcp.nodes (node_id, name, address, state, renewed_at, expires_at, line_pid, line_started_at, "
        "version, schema_revision) values ($1, $2, '', $3, clock_timestamp() + make_interval(secs => $4), "
        "clock_timestamp() + make_interval(secs => $5), $6, $7, '', '')",
        node,
        row["name"],
        row["state"],
        row["renewed"],
        row["expires"],
        row["pid"],
        row["started"],
    )


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database, timeout=10)
    yield connection
    await connection.close()


class Scene:
    """A session of a node that can be declared dead, and a node that may take it."""

    def __init__(self, hand: asyncpg.Connection, former: Store, taker: Store, session: Session) -> None:
        self.hand, self.former, self.taker, self.session = hand, former, taker, session
        self.table = taker.takeovers

    async def bury(self) -> None:
        await self.hand.execute(
            "update pgmcp.nodes set state = 'dead', cause = 'lease' where node_id = $1", self.former.node
        )

    async def take(self) -> SessionFacts:
        facts = await self.table.take(self.session.key)
        assert facts is not None
        return facts


@pytest.fixture
async def scene(database: str, hand: asyncpg.Connection) -> AsyncIterator[Scene]:
    async with store(database) as former, store(database) as taker:
        await joined(hand, former.node, name="former")
        await joined(hand, taker.node, name="taker")
        yield Scene(hand, former, taker, await opened(former))


# -- death -------------------------------------------------------------------------------------------------------------


async def condemned(scene: Scene, *, by_lease: bool = True, by_silence: bool = True) -> dict[NodeId, str]:
    found = await scene.table.condemn(by_lease=by_lease, by_silence=by_silence)
    return {one.node: one.cause for one in found}


async def test_a_lease_that_ran_out_is_a_death_and_one_that_did_not_is_none(scene: Scene) -> None:
    late = NodeId(IDS.uuid())
    await joined(scene.hand, late, expires=-0.01)
    assert await condemned(scene, by_lease=False) == {}
    assert await condemned(scene, by_silence=False) == {late: "lease"}
    assert await condemned(scene) == {}, "nobody dies twice"


async def test_silence_is_a_death_only_where_the_line_has_no_backend(scene: Scene) -> None:
    gone, alive, reused, never, fresh = (NodeId(IDS.uuid()) for _ in range(5))
    [mine] = await scene.hand.fetch("select pid, backend_start from pg_stat_activity where pid = pg_backend_pid()")
    other = mine["backend_start"].replace(year=2000)
    await joined(scene.hand, gone, renewed=-1.6, pid=NOBODY, started=other)
    await joined(scene.hand, alive, renewed=-9, pid=mine["pid"], started=mine["backend_start"])
    await joined(scene.hand, reused, renewed=-1.6, pid=mine["pid"], started=other)
    await joined(scene.hand, never, renewed=-9)
    await joined(scene.hand, fresh, renewed=-1.3, pid=NOBODY, started=other)
    assert await condemned(scene, by_silence=False) == {}
    assert await condemned(scene, by_lease=False) == {gone: "silence", reused: "silence"}


async def test_a_role_that_may_not_see_backends_takes_them_for_alive(database: str, scene: Scene) -> None:
    """Seen on PostgreSQL 15 and 18: other roles see the pid, and NULL for when it started."""
    role, node = f"watcher_{IDS.token()}", NodeId(IDS.uuid())
    mine = await scene.hand.fetchval("select pg_backend_pid()")
    await joined(scene.hand, node, renewed=-5, pid=mine, started=None)
    await scene.hand.execute(
        f"create role {role} login password 'x'; grant usage on schema pgmcp to {role}; "
        f"grant select, update on all tables in schema pgmcp to {role}; grant insert, delete on pgmcp.secrets to {role}"
    )
    try:
        at = urlsplit(database)
        theirs = at._replace(netloc=f"{role}:x@{at.hostname}:{at.port}").geturl()
        async with store(theirs, scene.taker.node) as watcher:
            table = watcher.takeovers
            await scene.hand.execute("update pgmcp.nodes set line_started_at = now() where node_id = $1", node)
            assert await table.condemn(by_lease=True, by_silence=True) == []
    finally:
        await scene.hand.execute(f"drop owned by {role}; drop role {role}")


async def test_a_renewal_that_is_under_way_saves_its_node(database: str, scene: Scene) -> None:
    late = NodeId(IDS.uuid())
    await joined(scene.hand, late, expires=-0.01)
    async with scene.hand.transaction():
        await scene.hand.execute(
            "update pgmcp.nodes set expires_at = clock_timestamp() + interval '10 s' where node_id = $1", late
        )
        assert await condemned(scene) == {}
    assert await condemned(scene) == {}


async def test_the_dead_condemn_nobody(scene: Scene) -> None:
    await joined(scene.hand, NodeId(IDS.uuid()), expires=-1)
    await scene.hand.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", scene.taker.node)
    assert await condemned(scene) == {}


async def test_observers_that_look_at_once_agree(database: str, scene: Scene) -> None:
    late = {NodeId(IDS.uuid()) for _ in range(40)}
    for node in late:
        await joined(scene.hand, node, expires=-0.01)
    async with AsyncExitStack() as stack:
        observers = [await stack.enter_async_context(store(database)) for _ in range(6)]
        for observer in observers:
            await joined(scene.hand, observer.node)
        tables = [observer.takeovers for observer in observers]
        found = await asyncio.gather(*(table.condemn(by_lease=True, by_silence=True) for table in tables))
    assert Counter(one.node for some in found for one in some) == dict.fromkeys(late, 1)


# -- change of owner ---------------------------------------------------------------------------------------------------


async def test_the_session_of_a_dead_node_is_taken_once_and_written_down(scene: Scene) -> None:
    await scene.bury()
    first = await scene.take()
    assert (first.owner, first.epoch, first.orphaned) == (scene.taker.node, 2, False)
    assert await scene.take() == first, "a repeat finds itself the owner"
    rows = await scene.hand.fetch("select from_node, to_node, epoch, reason from pgmcp.takeover_history")
    assert [tuple(row) for row in rows] == [("former", "taker", 2, "lease")]


async def test_the_living_keep_their_sessions(scene: Scene) -> None:
    for state in ("joining", "ready", "draining"):
        await scene.hand.execute("update pgmcp.nodes set state = $2 where node_id = $1", scene.former.node, state)
        facts = await scene.take()
        assert (facts.owner, facts.epoch, facts.orphaned) == (scene.former.node, 1, False)
        assert await scene.table.take_orphans(10) == []


@pytest.mark.parametrize("state", ["joining", "draining", "left", "dead"])
async def test_only_ready_nodes_take(scene: Scene, state: str) -> None:
    await scene.bury()
    await scene.former.inbox.accept([request(scene.session)])
    await scene.hand.execute("update pgmcp.nodes set state = $2 where node_id = $1", scene.taker.node, state)
    facts = await scene.take()
    assert (facts.owner, facts.epoch, facts.orphaned) == (scene.former.node, 1, True)
    assert await scene.table.take_orphans(10) == []


async def test_of_two_takers_one_wins_and_the_other_hears_of_it(database: str, scene: Scene) -> None:
    await scene.bury()
    async with store(database) as second:
        await joined(scene.hand, second.node)
        tables = [scene.table, second.takeovers]
        async with scene.hand.transaction():
            await scene.hand.fetch("select from pgmcp.sessions where id = $1 for update", scene.session.key)
            tries = [asyncio.create_task(table.take(scene.session.key)) for table in tables]
            eyes = await asyncpg.connect(database)
            await Watcher(eyes).until_waiting("take_session", tries[0], 2)
            await eyes.close()
        found = [await each for each in tries]
        assert {facts.orphaned for facts in found if facts} == {False, True}
        again = [await table.take(scene.session.key) for table in tables]
        assert {facts and facts.epoch for facts in again} == {2}
    assert await scene.hand.fetchval("select count(*) from pgmcp.takeovers") == 1


async def test_an_answer_that_is_being_committed_is_seen_by_the_new_owner(database: str, scene: Scene) -> None:
    """Read in the statement that locks, the request would be unfinished, and be answered twice."""
    await scene.former.inbox.accept([request(scene.session)])
    (claimed,) = await scene.former.inbox.claim(scene.session.ownership)
    await scene.bury()
    blocker, eyes = await asyncpg.connect(database), await asyncpg.connect(database)
    try:
        async with blocker.transaction():
            await blocker.fetch("select from pgmcp.streams where session = $1 for update", scene.session.key)
            answering = asyncio.create_task(scene.former.log.append(answer(claimed)))
            await Watcher(eyes).until_waiting("append", answering)
            taking = asyncio.create_task(scene.take())
            await Watcher(eyes).until_waiting("take_session", taking)
        await answering
        facts = await taking
    finally:
        await blocker.close()
        await eyes.close()
    left = await scene.table.inherit(replace(scene.session.ownership, epoch=facts.epoch))
    assert left.requests == ()
    await check_streams(scene.hand)


async def test_an_answer_that_comes_after_the_takeover_is_refused(scene: Scene) -> None:
    await scene.former.inbox.accept([request(scene.session)])
    (claimed,) = await scene.former.inbox.claim(scene.session.ownership)
    await scene.bury()
    facts = await scene.take()
    assert isinstance(await outcome(scene.former.log.append(answer(claimed))), Fenced)
    left = await scene.table.inherit(replace(scene.session.ownership, epoch=facts.epoch))
    assert [item.key for item in left.requests] == [claimed.key]
    assert await scene.hand.fetchval("select count(*) from pgmcp.events") == 0


async def test_what_is_accepted_beside_a_takeover_is_for_the_new_owner(database: str, scene: Scene) -> None:
    await scene.bury()
    eyes = await asyncpg.connect(database)
    try:
        async with scene.hand.transaction():
            await scene.hand.fetch("select from pgmcp.sessions where id = $1 for update", scene.session.key)
            await scene.hand.execute(
                "update pgmcp.sessions set owner = $2, epoch = 2 where id = $1", scene.session.key, scene.taker.node
            )
            accepting = asyncio.create_task(scene.former.inbox.accept([request(scene.session)]))
            await Watcher(eyes).until_waiting("accept", accepting)
        accepted = await accepting
    finally:
        await eyes.close()
    assert (accepted.facts.owner, accepted.facts.epoch, accepted.facts.orphaned) == (scene.taker.node, 2, False)


async def test_accept_and_attach_say_that_the_owner_is_gone(scene: Scene) -> None:
    living = await scene.taker.inbox.accept([request(scene.session)])
    assert not living.facts.orphaned
    await scene.bury()
    accepted = await scene.taker.inbox.accept([request(scene.session, "2")])
    assert accepted.facts.orphaned
    attached = await scene.taker.log.attach(scene.session.session_id, request(scene.session).principal, None)
    assert attached.facts.orphaned  # type: ignore[union-attr]


# -- orphans -----------------------------------------------------------------------------------------------------------


async def test_only_what_somebody_waits_for_is_swept(scene: Scene) -> None:
    idle, working, watching, listening, deserted = [await opened(scene.former) for _ in range(5)]
    await scene.former.inbox.accept([request(working)])
    await scene.former.inbox.write_journal(watching.ownership, JournalEntry("subscription", "x", b"{}"), 1)
    principal = request(idle).principal
    await scene.taker.log.attach(listening.session_id, principal, None)
    await scene.former.log.attach(deserted.session_id, principal, None)  # by a node that is dead as well
    await scene.bury()
    taken = await scene.table.take_orphans(10)
    assert {one.session for one in taken} == {working.key, watching.key, listening.key}
    assert {one.epoch for one in taken} == {2}


async def test_eight_sweepers_take_a_thousand_orphans_once_each(database: str, scene: Scene) -> None:
    """Also more orphans than a sweep takes at once: each sweeper goes on until there are none."""
    await scene.hand.execute(
        "with made as (insert into pgmcp.sessions (session_id, owner, transport) "
        "select 's' || n, $1, 'streamable' from generate_series(1, 1000) n returning id) "
        "insert into pgmcp.requests (id, session, rpc_id, body, context, open) "
        "select gen_random_uuid(), id, '1', '', '', true from made",
        scene.former.node,
    )
    await scene.bury()
    taken: list[int] = []

    async def sweep(sweeper: Store) -> None:
        table = sweeper.takeovers
        while some := await table.take_orphans(10):
            assert len(some) <= 10
            taken.extend(one.session for one in some)

    async with AsyncExitStack() as stack:
        sweepers = [await stack.enter_async_context(store(database, pool_size=3)) for _ in range(8)]
        for sweeper in sweepers:
            await joined(scene.hand, sweeper.node)
        await asyncio.gather(*(sweep(sweeper) for sweeper in sweepers))
    assert (len(taken), len(set(taken))) == (1000, 1000)
    assert await scene.hand.fetchval("select count(*) from pgmcp.takeovers where epoch = 2") == 1000


async def test_those_with_work_are_swept_first(scene: Scene) -> None:
    watching, working = [await opened(scene.former) for _ in range(2)]
    await scene.former.inbox.write_journal(watching.ownership, JournalEntry("subscription", "x", b"{}"), 1)
    await scene.former.inbox.accept([request(working)])
    await scene.bury()
    taken = [(await scene.table.take_orphans(1))[0].session for _ in range(2)]
    assert taken == [working.key, watching.key]


async def test_a_sweep_passes_by_what_somebody_holds(database: str, scene: Scene) -> None:
    other = await opened(scene.former)
    for session in (scene.session, other):
        await scene.former.inbox.accept([request(session)])
    await scene.bury()
    async with scene.hand.transaction():
        await scene.hand.fetch("select from pgmcp.sessions where id = $1 for update", scene.session.key)
        assert [one.session for one in await scene.table.take_orphans(10)] == [other.key]
    assert [one.session for one in await scene.table.take_orphans(10)] == [scene.session.key]


# -- what is inherited -------------------------------------------------------------------------------------------------


async def test_attempts_and_runs_are_counted_before_they_are_made(scene: Scene) -> None:
    await scene.former.inbox.accept([request(scene.session)])
    await scene.former.inbox.accept([request(scene.session, "2")])
    first, second = await scene.former.inbox.claim(scene.session.ownership)
    await scene.bury()
    ownership = replace(scene.session.ownership, epoch=(await scene.take()).epoch)
    left = [await scene.table.inherit(ownership) for _ in range(3)]
    assert [each.attempt for each in left] == [1, 2, 3]
    for _ in range(2):  # a repeat counts nothing
        await scene.table.adopt(ownership, [(first.key, 2), (second.key, 1)])
    rows = await scene.hand.fetch("select id, runs, claimed_epoch from pgmcp.requests order by position")
    assert [tuple(row) for row in rows] == [(first.key, 2, 2), (second.key, 1, 2)]
    await scene.table.restored(ownership, left[-1])
    assert (await scene.table.inherit(ownership)).attempt == 1
    assert await scene.taker.inbox.unclaimed() == []


async def test_an_ownership_that_is_over_inherits_and_adopts_nothing(scene: Scene) -> None:
    await scene.former.inbox.accept([request(scene.session)])
    (claimed,) = await scene.former.inbox.claim(scene.session.ownership)
    former = scene.former.takeovers
    await scene.bury()
    await scene.take()
    assert isinstance(await outcome(former.inherit(scene.session.ownership)), Fenced)
    assert isinstance(await outcome(former.adopt(scene.session.ownership, [(claimed.key, 2)])), Fenced)
    assert await scene.hand.fetchval("select restores from pgmcp.sessions") == 0
    assert await scene.hand.fetchval("select runs from pgmcp.requests") == 1


async def test_a_takeover_whose_reply_was_lost_is_found_by_its_work(scene: Scene) -> None:
    await scene.former.inbox.accept([request(scene.session)])
    await scene.former.inbox.claim(scene.session.ownership)
    await scene.bury()
    facts = await scene.take()
    assert await scene.taker.inbox.unclaimed() == [replace(scene.session.ownership, epoch=facts.epoch)]


async def test_what_was_waiting_when_postgres_came_up_may_have_run(scene: Scene) -> None:
    """Claims commit asynchronously; a crash of PostgreSQL forgets them, and resets its statistics."""
    await scene.former.inbox.accept([request(scene.session)])
    await scene.hand.execute("select pg_stat_reset_shared('bgwriter')")
    await scene.former.inbox.accept([request(scene.session, "2")])
    await scene.bury()
    ownership = replace(scene.session.ownership, epoch=(await scene.take()).epoch)
    left = await scene.table.inherit(ownership)
    assert [item.rpc_id for item in left.requests] == ["1"]
    await scene.table.adopt(ownership, [(left.requests[0].key, 1)])
    assert [claimed.rpc_id for claimed in await scene.taker.inbox.claim(ownership)] == ["2"]


async def test_a_living_owner_finishes_a_request_whose_claim_postgres_forgot(scene: Scene) -> None:
    await scene.former.inbox.accept([request(scene.session)])
    (claimed,) = await scene.former.inbox.claim(scene.session.ownership)
    await scene.hand.execute("update pgmcp.requests set claimed_epoch = null, claim = null")
    await scene.former.log.append(answer(claimed))
    assert await scene.hand.fetchval("select outcome from pgmcp.requests") == "answered"


# -- what is kept ------------------------------------------------------------------------------------------------------


# -- hand-over ---------------------------------------------------------------------------------------------------------


def giving(scene: Scene) -> TableTakeovers:
    return scene.former.takeovers


async def owner_row(scene: Scene) -> tuple[NodeId, int] | None:
    row = await scene.hand.fetchrow("select owner, epoch from pgmcp.sessions where id = $1", scene.session.key)
    return None if row is None else (row["owner"], row["epoch"])


async def test_a_session_is_handed_over_and_its_former_owner_is_fenced(scene: Scene) -> None:
    await scene.former.inbox.accept([request(scene.session)])
    (claimed,) = await scene.former.inbox.claim(scene.session.ownership)
    moved = await giving(scene).hand_over(scene.session.ownership, scene.taker.node)
    assert moved == replace(scene.session.ownership, epoch=2)
    for write in (
        scene.former.log.append(answer(claimed)),
        scene.former.inbox.claim(scene.session.ownership),
        scene.former.inbox.write_journal(scene.session.ownership, JournalEntry("level", "", b"{}"), 1),
    ):
        assert isinstance(await outcome(write), Fenced)
    assert [item.key for item in (await scene.table.inherit(moved)).requests] == [claimed.key]
    [row] = await scene.hand.fetch("select session_id, from_node, to_node, epoch, reason from pgmcp.takeovers")
    assert tuple(row) == (scene.session.session_id, scene.former.node, scene.taker.node, 2, "drain")


async def test_a_hand_over_whose_reply_was_lost_is_repeated_without_effect(scene: Scene) -> None:
    first = await giving(scene).hand_over(scene.session.ownership, scene.taker.node)
    assert await giving(scene).hand_over(scene.session.ownership, scene.taker.node) == first
    assert await owner_row(scene) == (scene.taker.node, 2)
    assert await scene.hand.fetchval("select count(*) from pgmcp.takeovers") == 1


@pytest.mark.parametrize("state", ["joining", "draining", "left", "dead", None])
async def test_only_ready_nodes_are_given_sessions(scene: Scene, state: str | None) -> None:
    other = NodeId(IDS.uuid())
    if state is not None:
        await joined(scene.hand, other, state=state)
    assert await giving(scene).hand_over(scene.session.ownership, other) is None
    assert await owner_row(scene) == (scene.former.node, 1)
    assert await scene.hand.fetchval("select count(*) from pgmcp.takeovers") == 0


async def test_nobody_gives_away_what_he_does_not_own(scene: Scene) -> None:
    assert await giving(scene).hand_over(replace(scene.session.ownership, epoch=2), scene.taker.node) is None
    assert await scene.table.hand_over(scene.session.ownership, scene.taker.node) is None
    await scene.bury()
    await scene.take()
    await joined(scene.hand, third := NodeId(IDS.uuid()))
    assert await giving(scene).hand_over(scene.session.ownership, third) is None
    assert await owner_row(scene) == (scene.taker.node, 2)


async def test_ready_nodes_are_the_others_with_what_they_own(scene: Scene) -> None:
    for state in ("joining", "draining", "left", "dead"):
        await joined(scene.hand, NodeId(IDS.uuid()), state=state)
    assert await giving(scene).ready_nodes() == [Candidate(scene.taker.node, "", 0)]
    assert await scene.table.ready_nodes() == [Candidate(scene.former.node, "", 1)]


@pytest.mark.parametrize("first", ["hand_over", "accept"])
async def test_what_is_accepted_beside_a_hand_over_is_for_the_next_owner(
    database: str, scene: Scene, first: str
) -> None:
    message, works = request(scene.session), dict[str, asyncio.Task[Any]]()
    eyes = await asyncpg.connect(database)
    try:
        async with scene.hand.transaction():
            await scene.hand.fetch("select from pgmcp.sessions where id = $1 for update", scene.session.key)
            for name in sorted(("hand_over", "accept"), key=lambda name: name != first):
                works[name] = asyncio.create_task(
                    giving(scene).hand_over(scene.session.ownership, scene.taker.node)
                    if name == "hand_over"
                    else scene.taker.inbox.accept([message])
                )
                await Watcher(eyes).until_waiting(name, works[name])
        moved, accepted = await works["hand_over"], await works["accept"]
    finally:
        await eyes.close()
    assert moved == replace(scene.session.ownership, epoch=2)
    assert (accepted.facts.owner, accepted.facts.epoch) in {(scene.former.node, 1), (scene.taker.node, 2)}
    assert not accepted.facts.orphaned
    assert (await scene.table.inherit(moved)).requests == (), "it was not started"
    assert [claimed.key for claimed in await scene.taker.inbox.claim(moved)] == [message.key]


@pytest.mark.parametrize("first", ["hand_over", "end_session"])
async def test_a_delete_beside_a_hand_over_ends_the_session(database: str, scene: Scene, first: str) -> None:
    works, eyes = dict[str, asyncio.Task[Any]](), await asyncpg.connect(database)
    try:
        async with scene.hand.transaction():
            await scene.hand.fetch("select from pgmcp.sessions where id = $1 for update", scene.session.key)
            for name in sorted(("hand_over", "end_session"), key=lambda name: name != first):
                works[name] = asyncio.create_task(
                    giving(scene).hand_over(scene.session.ownership, scene.taker.node)
                    if name == "hand_over"
                    else scene.taker.inbox.end(scene.session.session_id, ANONYMOUS)
                )
                await Watcher(eyes).until_waiting(name, works[name])
        moved = await works["hand_over"]
        assert await works["end_session"] == scene.session.key
    finally:
        await eyes.close()
    assert moved in {None, replace(scene.session.ownership, epoch=2)}
    assert await owner_row(scene) is None
    if moved is not None:
        assert isinstance(await outcome(scene.table.inherit(moved)), Fenced)


async def test_requests_can_be_left_unclaimed_while_others_are_served(scene: Scene) -> None:
    asked, told, more = request(scene.session), request(scene.session, None), request(scene.session, "2")
    for message in (asked, told, more):
        await scene.former.inbox.accept([message])
    claimed = await scene.former.inbox.claim(scene.session.ownership, requests=False)
    assert [item.key for item in claimed] == [told.key]
    moved = await giving(scene).hand_over(scene.session.ownership, scene.taker.node)
    assert moved is not None
    assert (await scene.table.inherit(moved)).requests == ()
    assert [item.key for item in await scene.taker.inbox.claim(moved)] == [asked.key, more.key]


async def test_what_was_exported_is_there_until_the_restore_is_done(scene: Scene) -> None:
    for version, entry in enumerate((JournalEntry("export", "", b"7"), JournalEntry("level", "", b"{}")), 1):
        await scene.former.inbox.write_journal(scene.session.ownership, entry, version)
    moved = await giving(scene).hand_over(scene.session.ownership, scene.taker.node)
    assert moved is not None
    for _ in range(2):
        assert {entry.kind for entry in (await scene.table.inherit(moved)).journal} == {"export", "level"}
    await scene.table.restored(moved, await scene.table.inherit(moved))
    assert {entry.kind for entry in (await scene.table.inherit(moved)).journal} == {"level"}


# -- afterwards --------------------------------------------------------------------------------------------------------


async def test_rows_of_nodes_that_are_over_are_kept_for_a_while(scene: Scene) -> None:
    for number in range(40):
        await joined(scene.hand, NodeId(IDS.uuid()), state="dead", renewed=-60.0 * number, name=f"d{number}")
    await joined(scene.hand, NodeId(IDS.uuid()), state="left", renewed=-8 * 86400.0, name="old")
    await scene.hand.execute(
        "update pgmcp.nodes set state = 'dead', renewed_at = now() - interval '9 days' where node_id = $1",
        scene.former.node,
    )
    await Retention(scene.taker.database, IDS).prune()
    names = {row["name"] for row in await scene.hand.fetch("select name from pgmcp.nodes")}
    assert names == {"taker", "former", *(f"d{number}" for number in range(25))}, "and while they own a session"


async def test_streams_that_a_dead_node_carried_are_carried_by_nobody(scene: Scene) -> None:
    await scene.former.log.attach(scene.session.session_id, request(scene.session).principal, None)
    await Retention(scene.taker.database, IDS).prune()
    assert await scene.hand.fetchval("select sink from pgmcp.streams") == scene.former.node
    await scene.bury()
    await Retention(scene.taker.database, IDS).prune()
    assert await scene.hand.fetchval("select sink from pgmcp.streams") is None
