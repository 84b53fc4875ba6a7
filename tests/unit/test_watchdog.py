"""The watchdog: it sees a loop that stands, once for each time, and says so once a minute."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from pgmcp.clock import Clock
from pgmcp.node import watchdog
from pgmcp.node.watchdog import watched
from tests.harness.waiting import eventually


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "BLOCKED_SECONDS", 0.5)


def stand(seconds: float) -> None:
    time.sleep(seconds)


def threads() -> int:
    return sum(thread.name == "pgmcp watchdog" for thread in threading.enumerate())


async def test_each_time_counts_and_one_stack_a_minute_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with watched(Clock()) as found:
        for turn in (1, 2):
            await asyncio.sleep(0.1)
            stand(1.2)
            assert found.blocked == turn
        await eventually(lambda: "the event loop goes on" in caplog.text, "it says how long that was")
    (said,) = [record.getMessage() for record in caplog.records if "has been blocked" in record.getMessage()]
    assert "in stand\n" in said


async def test_one_thread_watches_a_loop_and_ends_with_the_last_node() -> None:
    with watched(Clock()) as one:
        with watched(Clock()) as two:
            assert one is two
        assert threads() == 1
    await eventually(lambda: threads() == 0, "it ends")


async def test_an_idle_loop_is_not_blocked() -> None:
    with watched(Clock()) as found:
        before = found.ticked_at
        await eventually(lambda: found.ticked_at > before, "it ticks")


class JumpingClock(Clock):
    """Time that jumps, as after the sleep of a laptop."""

    ahead = 0.0

    def boottime(self) -> float:
        return super().boottime() + self.ahead


async def test_a_process_that_stood_as_a_whole_blames_nobody(caplog: pytest.LogCaptureFixture) -> None:
    clock = JumpingClock()
    with watched(clock) as found:
        for _ in range(3):
            clock.ahead += 30
            await asyncio.sleep(0.2)
        assert found.blocked == 0
    assert "blocked" not in caplog.text
