"""The lease: when a node may act, in a time that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgmcp.cluster.lease import Lease, LeaseState
from pgmcp.errors import DatabaseUnavailable, Fenced, SettingsError
from pgmcp.settings import Settings
from pgmcp.types import NodeState
from tests.harness.clock import FakeClock, settle

SETTINGS = Settings()
Interrupt = Callable[["Scene"], Awaitable[None]]


class Row:
    """The node's row: renewals take ``delay`` and give what the test says."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.delay, self.live, self.away = clock, 0.0, True, False
        self.renewals = 0
        self.drift = 0.0
        self.before_reply: Callable[[], None] = lambda: None

    async def renew(self) -> float | None:
        self.renewals += 1
        if self.delay:
            await self.clock.sleep(self.delay)
        self.before_reply()
        if self.away:
            message = "away"
            raise DatabaseUnavailable(message)
        return self.clock.now + self.drift if self.live else None

    async def set_state(self, state: NodeState) -> bool:
        return self.live


class Scene:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.row = Row(self.clock)
        self.fenced = 0
        self.lease = Lease(self.row, SETTINGS, self.clock, self.on_fenced)

    def on_fenced(self) -> None:
        self.fenced += 1


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_a_node_that_never_renewed_may_nothing(scene: Scene) -> None:
    assert (scene.lease.state, scene.lease.trusted, scene.lease.suspended_for) == (LeaseState.JOINING, False, 0.0)


async def test_trust_runs_from_the_start_of_the_attempt(scene: Scene) -> None:
    scene.row.delay = 1.4
    renewal = asyncio.create_task(scene.lease.renew())
    await scene.clock.advance(1.4)
    await renewal
    assert scene.lease.trusted
    await scene.clock.advance(SETTINGS.trust - 1.4 - 0.001)
    assert scene.lease.trusted
    await scene.clock.advance(0.001)
    assert scene.lease.state is LeaseState.SUSPENDED


async def test_a_reply_that_comes_after_the_trust_gives_none(scene: Scene) -> None:
    """The process stood still between asking and hearing."""
    scene.row.before_reply = lambda: scene.clock.jump(SETTINGS.trust)
    await scene.lease.renew()
    assert scene.lease.state is LeaseState.SUSPENDED


async def test_a_frozen_process_knows_at_once(scene: Scene) -> None:
    """No timer has run yet when it is asked."""
    await scene.lease.renew()
    scene.clock.jump(SETTINGS.trust + 3)
    assert not scene.lease.trusted
    assert scene.lease.suspended_for == pytest.approx(3)
    await scene.lease.renew()
    assert scene.lease.trusted
    assert scene.lease.suspended_for == 0


async def test_a_failed_renewal_changes_nothing(scene: Scene) -> None:
    await scene.lease.renew()
    scene.row.away = True
    await scene.clock.advance(SETTINGS.trust - 0.1)
    with pytest.raises(DatabaseUnavailable):
        await scene.lease.renew()
    assert scene.lease.trusted
    await scene.clock.advance(0.1)
    assert scene.lease.state is LeaseState.SUSPENDED
    assert scene.fenced == 0


async def test_fenced_is_for_good(scene: Scene) -> None:
    await scene.lease.renew()
    scene.row.live = False
    await scene.lease.renew()
    assert scene.lease.state is LeaseState.FENCED
    scene.row.live = True
    await scene.lease.renew()
    scene.lease.fence()
    assert scene.lease.state is LeaseState.FENCED
    assert (scene.fenced, scene.row.renewals) == (1, 2)


async def test_a_renewal_in_flight_does_not_undo_a_fence(scene: Scene) -> None:
    scene.row.delay = 1.0
    renewal = asyncio.create_task(scene.lease.renew())
    await settle()
    scene.lease.fence()
    await scene.clock.advance(1)
    await renewal
    assert scene.lease.state is LeaseState.FENCED
    assert not scene.lease.trusted


async def test_writers_wait_for_trust(scene: Scene) -> None:
    writers = [asyncio.create_task(scene.lease.acting()) for _ in range(3)]
    await scene.clock.advance(30)
    assert not any(writer.done() for writer in writers)
    await scene.lease.renew()
    await settle()
    assert all(writer.done() for writer in writers)
    await scene.lease.acting()


async def test_writers_hear_of_the_fence(scene: Scene) -> None:
    writer = asyncio.create_task(scene.lease.acting())
    await settle()
    scene.lease.fence()
    with pytest.raises(Fenced):
        await writer


async def test_a_writer_that_was_woken_is_not_let_through_when_trust_is_over_again(scene: Scene) -> None:
    writer = asyncio.create_task(scene.lease.acting())
    await settle()
    await scene.lease.renew()
    scene.clock.jump(SETTINGS.trust)  # frozen between the wake-up and the writer's turn
    await settle()
    assert not writer.done()
    writer.cancel()


async def test_it_renews_for_ever_and_through_an_outage(scene: Scene) -> None:
    await scene.lease.renew()
    running = asyncio.create_task(scene.lease.run())
    await scene.clock.advance(60)
    assert scene.lease.trusted
    assert scene.row.renewals >= 59
    scene.row.away = True
    await scene.clock.advance(60)
    assert scene.lease.state is LeaseState.SUSPENDED
    scene.row.away = False
    await scene.clock.advance(SETTINGS.renew)
    assert scene.lease.trusted
    assert scene.fenced == 0
    running.cancel()


async def test_it_stops_renewing_when_it_is_fenced(scene: Scene) -> None:
    running = asyncio.create_task(scene.lease.run())
    scene.row.live = False
    await scene.clock.advance(SETTINGS.renew)
    assert running.done()
    assert scene.fenced == 1


async def test_the_loop_ticks_also_when_renewals_fail(scene: Scene) -> None:
    running = asyncio.create_task(scene.lease.run())
    scene.row.away = True
    for _ in range(3):
        await scene.clock.advance(SETTINGS.renew)
        assert scene.lease.ticked_at > scene.clock.boottime() - SETTINGS.renew
    running.cancel()


seconds = st.floats(min_value=0.01, max_value=60, allow_nan=False)


@settings(deadline=None)  # a machine that others use is slow at times
@given(renew=seconds, deadline=seconds, trust=seconds, ttl=seconds)
def test_settings_that_break_the_timing_rule_are_refused(
    renew: float, deadline: float, trust: float, ttl: float
) -> None:
    """One renewal may fail, and the next one must still come before trust ends, which must end before the lease."""
    fits = renew + 2 * deadline + 0.1 * ttl <= trust < ttl
    if fits:
        assert Settings(renew=renew, deadline=deadline, trust=trust, ttl=ttl).trust == trust
    else:
        with pytest.raises(SettingsError, match="trust"):
            Settings(renew=renew, deadline=deadline, trust=trust, ttl=ttl)


@settings(deadline=None)  # a machine that others use is slow at times
@given(ttl=st.floats(min_value=1, max_value=60), share=st.floats(0, 1))
def test_settings_that_keep_it_are_taken(ttl: float, share: float) -> None:
    trust = ttl * 0.9
    deadline = share * (trust - 0.2 * ttl) / 2 + 0.001
    assert Settings(renew=0.05 * ttl, deadline=deadline, trust=trust, ttl=ttl).trust == trust


def test_the_defaults_keep_it() -> None:
    assert (SETTINGS.renew, SETTINGS.deadline, SETTINGS.trust, SETTINGS.ttl) == (1.0, 1.5, 7.0, 10.0)


# -- who may declare others dead ---------------------------------------------------------------------------------------


async def renewing(scene: Scene, seconds: float) -> None:
    """Time passes, with a good renewal each second."""
    for _ in range(round(seconds)):
        await scene.lease.renew()
        await scene.clock.advance(1)


async def test_a_fresh_node_may_soon_speak_of_silence_and_later_of_leases(scene: Scene) -> None:
    assert scene.lease.may_condemn() == (False, False)
    await renewing(scene, 1)
    assert scene.lease.may_condemn() == (False, False)
    await renewing(scene, 1)
    assert scene.lease.may_condemn() == (False, True)
    await renewing(scene, SETTINGS.ttl - 2)
    assert scene.lease.may_condemn() == (True, True)


async def interrupted_by_failure(scene: Scene) -> None:
    scene.row.away = True
    with pytest.raises(DatabaseUnavailable):
        await scene.lease.renew()
    scene.row.away = False


async def interrupted_by_line(scene: Scene) -> None:
    scene.lease.hurry()


async def interrupted_by_pause(scene: Scene) -> None:
    scene.clock.jump(SETTINGS.renew + 2 * SETTINGS.deadline + 0.1)


async def interrupted_by_database_time(scene: Scene) -> None:
    scene.row.drift += 60


@pytest.mark.parametrize(
    "interrupt",
    [interrupted_by_failure, interrupted_by_line, interrupted_by_pause, interrupted_by_database_time],
    ids=lambda each: each.__name__.removeprefix("interrupted_by_"),
)
async def test_whoever_was_interrupted_waits_for_a_whole_ttl(scene: Scene, interrupt: Interrupt) -> None:
    """After an outage every live node gets the time of a lease to renew; until then its silence means nothing."""
    await renewing(scene, 30)
    await interrupt(scene)
    await renewing(scene, SETTINGS.ttl - 1)
    assert scene.lease.may_condemn() == (False, False)
    await renewing(scene, 2)
    assert scene.lease.may_condemn() == (True, True)


async def test_database_time_that_runs_a_little_apart_interrupts_nothing(scene: Scene) -> None:
    for _ in range(30):
        scene.row.drift += 0.3
        await renewing(scene, 1)
    assert scene.lease.may_condemn() == (True, True)


async def test_whoever_is_not_trusted_declares_nobody_dead(scene: Scene) -> None:
    await renewing(scene, 30)
    scene.clock.jump(SETTINGS.trust)
    assert scene.lease.may_condemn() == (False, False)
    await scene.lease.renew()
    scene.lease.fence()
    assert scene.lease.may_condemn() == (False, False)


async def test_a_lost_line_is_a_reason_to_renew_at_once(scene: Scene) -> None:
    running = asyncio.create_task(scene.lease.run())
    await scene.clock.advance(0.3)
    before = scene.row.renewals
    scene.lease.hurry()
    await settle()
    assert scene.row.renewals == before + 1
    running.cancel()


async def test_a_failed_renewal_is_tried_again_soon(scene: Scene) -> None:
    running = asyncio.create_task(scene.lease.run())
    scene.row.away = True
    await scene.clock.advance(SETTINGS.renew)
    before = scene.row.renewals
    scene.row.away = False
    await scene.clock.advance(0.3)
    assert (scene.row.renewals, scene.lease.trusted) == (before + 1, True)
    running.cancel()
