"""Single interleavings, step by step, that chance seldom finds: each shows one rule of the design that holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.proxy import Cut
from tests.property.scene import Scene


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()


def test_a_claim_that_is_heard_after_trust_is_over_starts_nothing(scene: Scene) -> None:
    scene.owner.store.wire.during("claim", Cut.AFTER, lambda: scene.owner.stand_still(8))
    call = scene.call()
    scene.passes(7.5)
    assert call.runs == 0
    scene.passes(2)
    scene.ends_well()
    assert call.runs == 1


def test_a_key_that_is_looked_up_until_trust_is_over_starts_nothing(scene: Scene) -> None:
    scene.owner.keys.takes = 7.5
    call = scene.call()
    scene.owner.store.wire.is_cut = True
    scene.passes(9)
    assert call.runs == 0
    scene.ends_well()


def test_an_append_that_arrives_after_a_takeover_is_refused(scene: Scene) -> None:
    call = scene.call(seconds=60)
    scene.passes(11)
    scene.owner.store.wire.delay("append", 5)  # progress, at 12 s
    scene.passes(1)
    scene.do(scene.owner.die)
    scene.passes(8)
    scene.ends_well()
    assert call.runs == 2


def test_an_append_of_a_frozen_owner_is_refused(scene: Scene) -> None:
    scene.owner.store.wire.during("append", Cut.BEFORE, lambda: scene.owner.stand_still(15))
    call = scene.call(seconds=60)
    scene.passes(40)
    assert scene.owner.over.is_set()
    scene.ends_well()
    assert call.runs == 2


def test_a_claim_whose_reply_is_lost_in_an_outage_is_found(scene: Scene) -> None:
    scene.owner.store.wire.during("claim", Cut.AFTER, lambda: scene.world.go_away_for(40))
    call = scene.call(safe=False)
    scene.passes(60)
    assert (call.acknowledged, call.runs, scene.world.unfinished()) == (True, 1, [])


def test_a_request_whose_claim_a_crash_forgot_runs_once(scene: Scene) -> None:
    """The next claim takes it again, its reply is lost, and it is heard when the request has been answered."""
    call = scene.call(safe=False, seconds=5)
    scene.do(scene.world.crash)
    for _ in range(100):
        scene.owner.store.wire.cut("claim", Cut.AFTER)
    scene.call()
    scene.passes(30)
    scene.owner.store.wire.clear()
    scene.passes(30)
    assert (call.runs, scene.world.unfinished()) == (1, [])
    scene.ends_well()


def test_an_owner_knows_for_a_while_what_it_has_answered(scene: Scene) -> None:
    """A claim that looked before the answer was stored may be heard after it."""
    call = scene.call(safe=False, seconds=1)
    scene.passes(2)
    (row,) = [row for row in scene.world.cluster.requests.values() if row.message.rpc_id == call.rpc_id]
    (actor,) = scene.owner.host.actors.values()
    assert row.finished
    assert row.key not in actor.working
    assert actor.has(row.key)


def test_a_sweep_whose_reply_is_lost_is_found(scene: Scene) -> None:
    scene.call(seconds=60)
    for node in scene.world.nodes:
        node.store.wire.cut("take_orphans", Cut.AFTER)
    scene.do(scene.owner.die)
    scene.passes(70)
    assert scene.world.unfinished() == []


@pytest.mark.parametrize("entries", [1, 2])
def test_a_handshake_goes_on_whose_owner_dies_in_the_middle_of_it(scene: Scene, entries: int) -> None:
    """What was asked, and what was answered, are written one after the other."""
    wire = scene.owner.store.wire

    def later() -> None:
        wire.during("write_journal", Cut.AFTER, scene.owner.die)

    wire.during("write_journal", Cut.AFTER, later if entries == 2 else scene.owner.die)
    session = scene.do(lambda: scene.world.open_session(scene.owner))
    scene.passes(60)
    assert scene.owner.gone
    assert not session.ended
    scene.ends_well()


@pytest.mark.parametrize("seconds", [12, 40, 70, 150])
def test_an_outage_of_any_length_costs_nothing(scene: Scene, seconds: float) -> None:
    """Longer than any write may wait, while a call says its progress and another one its answer."""
    calls = [scene.call(safe=False, seconds=30), scene.call(safe=False, seconds=5)]
    scene.do(lambda: scene.world.go_away_for(seconds))
    scene.passes(seconds + 30)
    assert scene.world.unfinished() == []
    assert [call.runs for call in calls] == [1, 1]
    assert scene.world.cluster.takeovers == []
    scene.ends_well()


def test_a_hand_over_that_fails_in_an_outage_costs_seconds(scene: Scene) -> None:
    """What was claimed goes on when the database is back, and does not wait for a survey."""
    call = scene.call(seconds=60)
    scene.passes(1)
    owner, to = scene.owner, scene.world.nodes[2].node
    scene.do(lambda: scene.world.go_away_for(40))
    key = scene.session.key
    assert key is not None
    scene.do(lambda: scene.world.spawn(owner.host.hand_over(key, to, busy=True)))
    scene.passes(46)
    assert call.runs == 2
    scene.ends_well()


def test_a_jump_of_the_databases_clock_kills_nobody(scene: Scene) -> None:
    scene.passes(15)  # everybody may declare deaths by now
    for seconds in (12, 3600, -5, 9, 6):
        scene.world.cluster.shift += seconds
        scene.passes(12)
    assert all(node.alive for node in scene.world.nodes)


def test_who_slept_through_a_restart_of_the_database_kills_nobody(scene: Scene) -> None:
    scene.passes(15)
    scene.do(lambda: scene.world.nodes[2].stand_still(2.05))
    scene.do(lambda: scene.world.go_away_for(2.0))
    scene.passes(20)
    assert all(node.alive for node in scene.world.nodes)
