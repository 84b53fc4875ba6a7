"""``Takeovers``, ``LeaseTable`` and ``Notifier``: deaths are declared, sessions taken and wake-ups carried."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pgmcp.errors import Fenced
from pgmcp.inheritance import Inheritance
from pgmcp.types import (
    ANONYMOUS,
    JUMP,
    Attachment,
    Claimed,
    Entry,
    JournalEntry,
    NodeState,
    Ownership,
    SessionFacts,
)
from tests.harness.proxy import Cut
from tests.harness.stores import Session, answer, opened, outcome, request
from tests.harness.waiting import eventually
from tests.ports.benches import LONG, Bench, Pair, Ports

each_cut = pytest.mark.parametrize("where", [Cut.BEFORE, Cut.AFTER], ids=["before", "after"])


async def condemned(observer: Ports, *, by_lease: bool = False, by_silence: bool = False) -> list[tuple[object, str]]:
    """Whom an observer that has just renewed declares dead."""
    await observer.lease.renew()
    found = await observer.takeovers.condemn(by_lease=by_lease, by_silence=by_silence)
    return [(node.node, node.cause) for node in found]


async def taken(pair: Pair) -> Ownership:
    """The first node has died, and the second one takes its session."""
    await pair.bench.die(pair.one)
    facts = await pair.two.takeovers.take(pair.session.key)
    assert facts is not None
    assert (facts.owner, facts.orphaned) == (pair.two.node, False)
    return Ownership(facts.session, facts.epoch)


async def claimed_by_the_first(pair: Pair, rpc_id: str = "1", **changes: Any) -> Claimed:
    await pair.two.inbox.accept([request(pair.session, rpc_id, **changes)])
    (claimed,) = await pair.one.inbox.claim(pair.session.ownership)
    return claimed


# -- deaths --


async def test_a_lease_that_ran_out_is_a_death(pair: Pair) -> None:
    await pair.bench.age(pair.one, LONG)
    assert await condemned(pair.two, by_silence=True) == []

    async def dead() -> bool:
        return await condemned(pair.two, by_lease=True) == [(pair.one.node, "lease")]

    await eventually(dead, "the node is declared dead")
    assert await condemned(pair.two, by_lease=True) == []


async def test_a_node_that_renews_or_has_its_line_lives(pair: Pair) -> None:
    await pair.one.lease.renew()
    assert await condemned(pair.two, by_lease=True, by_silence=True) == []
    await pair.bench.age(pair.one, 3)
    assert await condemned(pair.two, by_lease=True, by_silence=True) == []


async def test_silence_is_a_death_when_the_line_is_gone_too(pair: Pair) -> None:
    await pair.bench.hang_up(pair.one)
    await pair.bench.age(pair.one, 3)
    assert await condemned(pair.two, by_lease=True) == []

    async def dead() -> bool:
        return await condemned(pair.two, by_silence=True) == [(pair.one.node, "silence")]

    await eventually(dead, "the node is declared dead")


async def test_who_is_silent_itself_declares_nobody_dead(pair: Pair) -> None:
    """It stood still through an outage, or the database's clock has jumped: its peers may be as well as it is."""
    await pair.bench.hang_up(pair.one)
    for node in (pair.one, pair.two):
        await pair.bench.age(node, LONG)
    assert await pair.two.takeovers.condemn(by_lease=True, by_silence=True) == []
    assert await pair.one.lease.renew() is not None


async def test_a_dead_node_is_told_and_declares_nobody_dead(pair: Pair) -> None:
    await pair.bench.die(pair.one)
    assert await pair.one.lease.renew() is None
    assert not await pair.one.lease.set_state(NodeState.READY)
    await pair.bench.age(pair.two, LONG)
    assert await condemned(pair.one, by_lease=True) == []
    assert await pair.two.lease.renew() is not None


async def test_of_two_observers_one_declares_a_death(pair: Pair) -> None:
    others = [pair.two, *[await pair.bench.node() for _ in range(3)]]
    await pair.bench.age(pair.one, LONG)
    found: list[tuple[object, str]] = []

    async def dead() -> bool:
        for some in await asyncio.gather(*(condemned(node, by_lease=True) for node in others)):
            found.extend(some)
        return found != []

    await eventually(dead, "the node is declared dead")
    assert found == [(pair.one.node, "lease")]


async def test_a_renewal_tells_the_databases_time(pair: Pair) -> None:
    first, second = await pair.one.lease.renew(), await pair.two.lease.renew()
    assert first is not None
    assert second is not None
    assert first <= second < first + LONG


# -- changes of owner --


async def test_a_session_of_a_living_node_is_not_taken(pair: Pair) -> None:
    facts = await pair.two.takeovers.take(pair.session.key)
    assert facts == SessionFacts(pair.session.key, pair.one.node, 1, None)
    await pair.bench.age(pair.one, LONG)  # its lease is over, and nobody has said so
    assert await pair.two.takeovers.take(pair.session.key) == facts
    await pair.two.inbox.accept([request(pair.session)])
    assert await pair.two.takeovers.take_orphans(10) == []


@pytest.mark.parametrize("how", ["dead", "left"])
async def test_a_session_of_a_node_that_is_over_is_taken_once(pair: Pair, how: str) -> None:
    others = [pair.two, await pair.bench.node()]
    if how == "left":
        await pair.one.lease.set_state(NodeState.LEFT)
    else:
        await pair.bench.die(pair.one)
    accepted = await pair.two.inbox.accept([request(pair.session)])
    assert accepted.facts.orphaned
    tries = await asyncio.gather(*(node.takeovers.take(pair.session.key) for node in others * 3))
    after = [await node.takeovers.take(pair.session.key) for node in others]
    assert all(facts is not None and (facts.epoch, facts.orphaned) == (2, False) for facts in after)
    assert len({facts.owner for facts in after if facts is not None}) == 1
    assert all(facts is not None and (facts.orphaned or facts == after[0]) for facts in tries)
    assert after[0] is not None
    reason = "left" if how == "left" else "lease"
    assert await pair.bench.history(pair.session.key) == [(pair.one.node, after[0].owner, 2, reason)]


async def test_a_session_that_is_over_is_nobodys(pair: Pair) -> None:
    await pair.bench.die(pair.one)
    await pair.two.inbox.end(pair.session.session_id, ANONYMOUS)
    assert await pair.two.takeovers.take(pair.session.key) is None


async def test_a_node_that_is_not_ready_takes_nothing(pair: Pair) -> None:
    joining = await pair.bench.node(ready=False)
    await pair.bench.die(pair.one)
    await pair.two.inbox.accept([request(pair.session)])
    await pair.two.lease.set_state(NodeState.DRAINING)
    for node in (joining, pair.two):
        facts = await node.takeovers.take(pair.session.key)
        assert facts is not None
        assert facts.orphaned
        assert await node.takeovers.take_orphans(10) == []


async def test_a_sweep_takes_those_that_somebody_waits_for(bench: Bench) -> None:
    one, two = await bench.node(), await bench.node()
    idle, working, heard, subscribed = [await opened(one) for _ in range(4)]
    await two.inbox.accept([request(working, None)])
    assert isinstance(await two.log.attach(heard.session_id, ANONYMOUS, None), Attachment)
    assert isinstance(await one.log.attach(idle.session_id, ANONYMOUS, None), Attachment)  # by the node that dies
    await one.inbox.write_journal(subscribed.ownership, JournalEntry("subscription", "x", b"{}"), 1)
    await bench.die(one)
    assert len(await two.takeovers.take_orphans(1)) == 1
    found = {*await two.takeovers.take_orphans(10), *await two.inbox.owned()}
    assert found == {Ownership(session.key, 2) for session in (working, heard, subscribed)}
    assert await two.takeovers.take_orphans(10) == []


async def test_a_former_owner_writes_nothing(pair: Pair) -> None:
    claimed = await claimed_by_the_first(pair)
    new = await taken(pair)
    old, before = pair.session.ownership, await pair.bench.counts()
    writes = [
        pair.one.inbox.claim(old),
        pair.one.log.append(answer(claimed)),
        pair.one.inbox.write_journal(old, JournalEntry("level", "", b"{}"), 1),
        pair.one.takeovers.inherit(old),
        pair.one.takeovers.adopt(old, [(claimed.key, 2)]),
        pair.one.inbox.end_owned(old),
    ]
    for write in writes:
        assert isinstance(await outcome(write), Fenced)
    assert await pair.one.log.drop_sink(old, None) is None
    assert await pair.bench.counts() == before
    assert await pair.bench.runs(claimed.key) == 1
    assert await pair.two.inbox.owned() == {new}


async def test_an_answer_that_came_first_is_not_inherited(pair: Pair) -> None:
    claimed = await claimed_by_the_first(pair)
    await pair.one.log.append(answer(claimed))
    assert (await pair.two.takeovers.inherit(await taken(pair))).requests == ()


# -- what a new owner finds --


async def test_a_new_owner_inherits_what_may_have_run(pair: Pair) -> None:
    claimed = await claimed_by_the_first(pair, "7", body=b'{"x":1}')
    note = replace(answer(claimed, message=b'{"method":"notifications/progress"}'), finishes=None, outcome=None)
    await pair.one.log.append(note)
    await pair.one.inbox.write_journal(pair.session.ownership, JournalEntry("initialize", "", b"first"), 1)
    await pair.one.inbox.write_journal(pair.session.ownership, JournalEntry("level", "", b"second"), 2)
    await pair.two.inbox.accept([request(pair.session, "8")])
    cancel = request(pair.session, None, b'{"cancel":7}', method="notifications/cancelled")
    await pair.two.inbox.accept([cancel])
    new = await taken(pair)
    assert await pair.two.inbox.unclaimed() == [new]
    left = await pair.two.takeovers.inherit(new)
    (found,) = left.requests
    assert (found.key, found.rpc_id, found.body, found.runs, found.next_seq) == (claimed.key, "7", b'{"x":1}', 1, 2)
    assert (left.session_id, left.attempt, left.standalone) == (pair.session.session_id, 1, pair.session.standalone)
    assert [(entry.kind, entry.body) for entry in left.journal] == [("initialize", b"first"), ("level", b"second")]
    assert [(said.body, said.claimed) for said in left.heard] == [(cancel.body, False)]
    assert left.said == ((claimed.stream, note.message),)
    assert (pair.two.node, claimed.stream) in left.sinks


async def test_attempts_count_until_one_succeeds(pair: Pair) -> None:
    new = await taken(pair)
    left = [await pair.two.takeovers.inherit(new) for _ in range(3)]
    assert [each.attempt for each in left] == [1, 2, 3]
    await pair.two.takeovers.restored(new, left[0])
    assert (await pair.two.takeovers.inherit(new)).attempt == 4, "a late try of an earlier attempt ends no newer one"
    await pair.two.takeovers.restored(new, await pair.two.takeovers.inherit(new))
    assert (await pair.two.takeovers.inherit(new)).attempt == 1


async def test_a_run_is_counted_when_it_is_adopted(pair: Pair) -> None:
    first = await claimed_by_the_first(pair, "1")
    second = await claimed_by_the_first(pair, "2")
    new = await taken(pair)
    for _ in range(2):
        await pair.two.takeovers.adopt(new, [(first.key, 2), (second.key, 1)])
    assert [await pair.bench.runs(item.key) for item in (first, second)] == [2, 1]
    left = (await pair.two.takeovers.inherit(new)).requests
    assert [(item.key, item.runs) for item in left] == [(first.key, 2), (second.key, 1)], "a restore that failed counts"
    await pair.two.log.append(replace(answer(first), ownership=new))
    assert await pair.two.inbox.unclaimed() == []


# -- lost replies --


@each_cut
async def test_taking_may_be_repeated(pair: Pair, where: Cut) -> None:
    await pair.bench.die(pair.one)
    pair.bench.cut(pair.two, "take_session", where)
    facts = await pair.two.takeovers.take(pair.session.key)
    assert facts == SessionFacts(pair.session.key, pair.two.node, 2, None)
    assert len(await pair.bench.history(pair.session.key)) == 1


@each_cut
async def test_an_attempt_whose_reply_was_lost_is_one(pair: Pair, where: Cut) -> None:
    new = await taken(pair)
    pair.bench.cut(pair.two, "begin_restore", where)
    assert (await pair.two.takeovers.inherit(new)).attempt == 1
    assert (await pair.two.takeovers.inherit(new)).attempt == 2


@each_cut
async def test_an_adoption_whose_reply_was_lost_is_one_run(pair: Pair, where: Cut) -> None:
    claimed = await claimed_by_the_first(pair)
    new = await taken(pair)
    pair.bench.cut(pair.two, "adopt", where)
    await pair.two.takeovers.adopt(new, [(claimed.key, 2)])
    assert await pair.bench.runs(claimed.key) == 2


@each_cut
async def test_ending_an_owned_session_may_be_repeated(pair: Pair, where: Cut) -> None:
    pair.bench.cut(pair.one, "end_owned_session", where)
    await pair.one.inbox.end_owned(pair.session.ownership)
    assert set((await pair.bench.counts()).values()) == {0}


# -- trust --


async def test_writes_of_an_owner_wait_for_trust(bench: Bench) -> None:
    trust = asyncio.Event()
    trust.set()

    async def gate() -> None:
        await trust.wait()

    node = await bench.node(gate=gate)
    session: Session = await opened(node)
    await node.inbox.accept([request(session)])
    (claimed,) = await node.inbox.claim(session.ownership)
    trust.clear()
    own = session.ownership
    left = Inheritance(session.session_id, 1, session.standalone, 1, (), (), (), (), ())
    before = await bench.counts()
    writes = [
        node.inbox.claim(own),
        node.log.append(answer(claimed)),
        node.log.append(Entry(own, session.standalone, 1, b"{}")),
        node.inbox.write_journal(own, JournalEntry("level", "", b"{}"), 1),
        node.takeovers.inherit(own),
        node.takeovers.adopt(own, []),
        node.takeovers.restored(own, left),
        node.log.drop_sink(own, None),
        node.inbox.end_owned(own),
    ]
    tasks = [asyncio.ensure_future(outcome(write)) for write in writes]
    await asyncio.wait(tasks, timeout=0.2)
    assert not any(task.done() for task in tasks)
    assert await bench.counts() == before
    trust.set()
    await asyncio.gather(*tasks)
    assert set((await bench.counts()).values()) == {0}


async def test_a_node_that_was_declared_dead_ends_no_session(bench: Bench) -> None:
    async def gate() -> None:
        if dead:
            raise Fenced

    dead = False
    node = await bench.node(gate=gate)
    session = await opened(node)
    dead = True
    assert isinstance(await outcome(node.inbox.end_owned(session.ownership)), Fenced)
    assert (await bench.counts())["sessions"] == 1


# -- wake-ups --


async def test_a_wake_up_reaches_its_node_and_one_for_all_everybody(pair: Pair) -> None:
    await pair.one.notifier.notify([(pair.two.node, "i1"), (None, "o")])

    async def heard() -> bool:
        return pair.two.heard == ["i1", "o"] and pair.one.heard == ["o"]

    await eventually(heard, "the wake-ups are heard")


async def test_what_waited_when_a_term_began_may_have_run(pair: Pair) -> None:
    """Its claim may be among the commits that nobody waited for."""
    before, after = request(pair.session, "1"), request(pair.session, "2")
    await pair.two.inbox.accept([before])
    await pair.bench.fail_over()
    await pair.two.inbox.accept([after])
    now = replace(pair.session.ownership, epoch=pair.session.ownership.epoch + JUMP)
    left = await pair.one.takeovers.inherit(now)
    assert [item.key for item in left.requests] == [before.key]
