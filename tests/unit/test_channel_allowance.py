"""How much of what is said on a channel is read."""

from __future__ import annotations

from pgmcp.store.channel_allowance import FLOOD, QUIET_SECONDS, WINDOW_SECONDS, Allowance
from tests.harness.clock import FakeClock


def test_so_many_payloads_are_read_in_each_window() -> None:
    clock = FakeClock()
    allowance = Allowance(clock, 3, 100)
    assert [allowance.take("p") for _ in range(5)] == [True, True, True, False, False]
    clock.jump(2 * WINDOW_SECONDS)
    assert allowance.take("p")
    assert (allowance.dropped, allowance.flooded) == (2, False)


def test_so_much_text_is_read_in_each_window() -> None:
    clock = FakeClock()
    allowance = Allowance(clock, 1000, 100)
    assert [allowance.take("p" * 60), allowance.take("p" * 60)] == [True, False]


def test_it_is_a_flood_when_that_goes_on_and_none_after_some_quiet() -> None:
    clock = FakeClock()
    allowance = Allowance(clock, 10, 1000)
    for _ in range(FLOOD):
        assert not allowance.flooded
        assert sum(allowance.take("p") for _ in range(20)) == 10
        clock.jump(2 * WINDOW_SECONDS)
    assert allowance.flooded
    for _ in range(2):
        clock.jump(2 * WINDOW_SECONDS)
        allowance.take("p")
    assert not allowance.flooded
    assert sum([allowance.take("p" * 100) for _ in range(200)]) < 20
    assert allowance.flooded, "at once"
    clock.jump(QUIET_SECONDS)
    assert allowance.take("p")
    assert not allowance.flooded
