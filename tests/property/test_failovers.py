"""Failovers while statements take their time, looked for by hypothesis."""

from __future__ import annotations

from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property.profiles import failovers
from tests.property.scene import Scene

pytestmark = pytest.mark.timeout(400)  # its end are its examples, however busy the machine is

paces = st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0]), min_size=5, max_size=20)
moments = st.sampled_from([0.0, 0.1, 0.4, 1.0, 2.5])


@given(
    before=moments,
    away=st.sampled_from([0.0, 0.3, 3.0]),
    claims=st.integers(0, 3),
    paces=paces,
    again=moments | st.none(),
)
@failovers()
def test_a_synchronous_failover_costs_nothing(
    before: float, away: float, claims: int, paces: list[float], again: float | None
) -> None:
    with closing(Scene()) as scene:
        calls = [scene.call(safe=False, seconds=seconds) for seconds in (0.5, 4.0, 12.0)]
        scene.passes(before)
        calls.append(scene.call(safe=False, seconds=4.0))
        for pause in [0.0] if again is None else [0.0, again]:
            scene.passes(pause)
            scene.do(lambda: scene.world.spawn(scene.world.fails_over(away, claims=claims, paces=paces)))
            calls.append(scene.call(safe=False, seconds=1.0))
        scene.passes(12.0)
        scene.ends_well()
        assert [call.runs for call in calls] == [1] * len(calls)
        assert scene.world.cluster.takeovers == []


@given(
    before=moments,
    window=st.sampled_from([0.1, 0.4, 1.0, 3.0]),
    away=st.sampled_from([0.0, 0.3, 3.0]),
    claims=st.integers(0, 3),
    paces=paces,
    dies=moments | st.none(),
)
@failovers()
def test_a_failover_that_loses_commits_mixes_nothing_up(
    before: float, window: float, away: float, claims: int, paces: list[float], dies: float | None
) -> None:
    """The books of ``World`` say what may be lost; meanwhile the owner may die."""
    with closing(Scene()) as scene:
        for seconds in (0.5, 4.0, 12.0):
            scene.call(safe=seconds == 4.0, seconds=seconds)
        scene.passes(before)
        scene.do(lambda: scene.world.falls_behind(window, away, claims=claims, paces=paces))
        scene.do(lambda: scene.world.open_session(scene.world.nodes[2]))
        for seconds in (0.0, 1.0, 12.0):
            scene.call(safe=False, seconds=seconds)
            scene.passes(0.1)
        scene.do(lambda: scene.world.open_session(scene.owner))
        if dies is not None:
            scene.passes(dies)
            scene.do(scene.owner.die)
        scene.passes(12.0)
        scene.ends_well()
