"""``pgmcp demo``: the story that it tells, and what it says when something was lost."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import MCPError
from rich.console import Console

from pgmcp.cli.demo_scenes import charged_once, only_forward, outcome_is_unknown
from pgmcp.cli.demo_story import Finding, Lost, Story
from tests.harness.processes import ManagedProcess
from tests.harness.waiting import wait_until

BOUND = 200
STORY = (
    "connected: session node-",
    "6 calls of count; requests went to node-1",
    "kill -9 node-",
    "ended with code -9; 3 of 4 nodes left",
    "progress 8 of 8",
    "the result is right; the longest pause was",
    "owns the session now, epoch 2",
    "the one in its memory starts anew (1)",
    "the money is taken",
    "ended with code -9; 2 of 4 nodes left",
    '"outcome": "unknown"',
    "the ledger says that it ran once",
    "kill -STOP node-",
    "does not answer and gets no requests",
    "s after the freeze",
    "owns the session now, epoch 4",
    "kill -CONT node-",
    "joined again after",
    "it stored nothing",
    "pgmcp.takeover_history",
    "What the client saw",
    "nothing was lost",
)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[ManagedProcess]:
    """The command, not started yet; its output is no terminal."""
    process = ManagedProcess(
        [sys.executable, "-m", "pgmcp", "demo"], log_path=tmp_path / "demo.log", env={"TMPDIR": str(tmp_path)}
    )
    yield process
    process.stop()


def in_order(log: str, lines: tuple[str, ...]) -> None:
    at = 0
    for line in lines:
        found = log.find(line, at)
        assert found >= 0, f"{line!r} is missing, or not in its place:\n{log}"
        at = found


@pytest.mark.timeout(BOUND + 60)
def test_the_whole_story_is_told_and_nothing_is_lost(demo: ManagedProcess, tmp_path: Path) -> None:
    assert demo.start().wait(BOUND) == 0, demo.log
    in_order(demo.log, STORY)
    assert "\x1b" not in demo.log, "colours outside of a terminal"
    times = [float(seconds) for seconds in re.findall(r"^ *([\d.]+) s  ", demo.log, re.MULTILINE)]
    assert len(times) > 40
    assert times == sorted(times)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.log"], "it left files behind"


@pytest.mark.timeout(BOUND + 60)
def test_a_session_that_does_not_survive_is_a_loss(demo: ManagedProcess) -> None:
    demo.env["PGMCP_ON_OWNER_CHANGE"] = "end"
    assert demo.start().wait(BOUND) == 1, demo.log
    in_order(demo.log, ("kill -9 node-", "LOST: "))
    assert "nothing was lost" not in demo.log


@pytest.mark.timeout(BOUND + 60)
def test_ctrl_c_stops_it_also_with_a_frozen_node(demo: ManagedProcess, tmp_path: Path) -> None:
    demo.start()
    wait_until(lambda: "kill -STOP" in demo.log or not demo.running, BOUND, lambda: demo.log)
    children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()
    assert children
    demo.signal(signal.SIGINT)
    assert demo.wait(50) == 1, demo.log
    in_order(demo.log, ("stopped before the end",))
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert [path.name for path in tmp_path.iterdir()] == ["demo.log"], "it left files behind"


def told(**state: Any) -> tuple[int, str]:
    """The verdict of a story, and what it printed."""
    console = Console(file=io.StringIO(), width=200)
    story = Story(console=console, **state)
    code = story.verdict()
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_only_a_whole_story_without_loss_ends_with_0() -> None:
    assert told(finished=True)[0] == 0
    assert told()[0] == 1
    code, text = told(finished=True, lost="the counter went back")
    assert code == 1
    assert "LOST: the counter went back" in text
    assert "nothing was lost" not in text


def test_being_late_is_shown_and_is_no_loss() -> None:
    code, text = told(finished=True, findings=[Finding("owner killed", "a pause", 9.0, 4.8)])
    assert code == 0
    assert "late" in text


def test_what_counts_as_a_loss(tmp_path: Path) -> None:
    only_forward([1, 2, 3], 3)
    losses: list[list[float]] = [[1, 2, 2, 3], [1, 3, 2, 3], [1, 2], []]
    for reports in losses:
        with pytest.raises(Lost):
            only_forward(reports, 3)
    outcome_is_unknown(MCPError(-32000, "gone", {"outcome": "unknown"}))
    for data in (None, {"outcome": "done"}, "unknown"):
        with pytest.raises(Lost):
            outcome_is_unknown(MCPError(-32000, "gone", data))
    ledger = tmp_path / "ledger"
    for times in (0, 1, 2):
        ledger.write_text("".join(json.dumps({"order": "a"}) + "\n" for _ in range(times)))
        if times == 1:
            charged_once(ledger, "a")
        else:
            with pytest.raises(Lost, match=f"ran {times} times"):
                charged_once(ledger, "a")
