"""Grouped writes: order, one statement in flight, and a row's trouble is its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, Fenced, PgmcpError, SessionUnknown
from pgmcp.store import group_commit as module
from pgmcp.store.group_commit import BYTES, LARGE_BYTES, ROWS, GroupCommit
from pgmcp.store.statements import LockWait
from tests.harness.clock import FakeClock, settle
from tests.harness.stores import (
    Watcher,
    check_streams,
    opened,
    outcome,
    request,
    row_counts,
    store,
)


class Sender:
    """Stands for the statement: notes what it got, waits while a test holds it, fails as it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.lock_waits: list[LockWait] = []
        self.running = 0
        self.free = asyncio.Event()
        self.free.set()
        self.failures: list[BaseException] = []
        self.guilty: dict[Any, BaseException] = {}

    async def __call__(self, rows: Sequence[Any], lock_wait: LockWait) -> list[Any]:
        assert self.running == 0 or set(rows) <= self.guilty.keys(), "two statements of a group are in flight"
        self.running += 1
        self.batches.append(list(rows))
        self.lock_waits.append(lock_wait)
        try:
            await self.free.wait()
            if self.failures:
                raise self.failures.pop(0)
            for row in rows:
                if row in self.guilty:
                    raise self.guilty[row]
            return [f"did {row}" for row in rows]
        finally:
            self.running -= 1


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def send() -> Sender:
    return Sender()


@pytest.fixture
def group(send: Sender, clock: FakeClock) -> GroupCommit[Any, Any]:
    return GroupCommit(send, clock, key=str)


def put_all(
    group: GroupCommit[Any, Any], rows: Sequence[Any], patience: float | None = 10.0, size: int = 0
) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(outcome(group.put(row, patience=patience, size=size))) for row in rows]


def ended(tasks: Sequence[asyncio.Task[Any]]) -> list[Any]:
    """What tasks returned; those that still wait are reported as such, without waiting for them."""
    return [task.result() if task.done() else "waits" for task in tasks]


async def test_what_arrives_meanwhile_goes_with_the_next_in_order(group: GroupCommit[Any, Any], send: Sender) -> None:
    send.free.clear()
    tasks = put_all(group, range(5))
    await settle()
    tasks += put_all(group, range(5, 8))
    await settle()
    assert send.batches == [[0, 1, 2, 3, 4]]
    send.free.set()
    await settle()
    assert send.batches == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert ended(tasks) == [f"did {row}" for row in range(8)]


async def test_a_statement_has_bounds_in_rows_and_bytes(group: GroupCommit[Any, Any], send: Sender) -> None:
    put_all(group, range(ROWS + 1))
    await settle()
    assert [len(batch) for batch in send.batches] == [ROWS, 1]
    send.batches.clear()
    fit = BYTES // LARGE_BYTES
    put_all(group, range(fit + 1), size=LARGE_BYTES)
    await settle()
    assert send.batches == [list(range(fit)), [fit]]


async def test_a_large_row_holds_up_no_stranger_and_keeps_its_place(clock: FakeClock) -> None:
    sent: list[list[str]] = []
    large = asyncio.Event()

    async def send(rows: Sequence[str], _: LockWait) -> list[str]:
        sent.append(list(rows))
        if "a2 large" in rows:
            await large.wait()
        return list(rows)

    group: GroupCommit[str, str] = GroupCommit(send, clock, key=lambda row: row[0])
    tasks = [
        asyncio.create_task(group.put(row, patience=10, size=LARGE_BYTES + 1 if "large" in row else 1))
        for row in ("a1", "b1", "a2 large", "a3", "b2")
    ]
    await settle()
    assert sorted(sent) == [["a1", "b1"], ["a2 large"], ["b2"]]
    assert ended(tasks) == ["a1", "b1", "waits", "waits", "b2"]
    large.set()
    await settle()
    assert sent[3:] == [["a3"]]
    assert ended(tasks) == ["a1", "b1", "a2 large", "a3", "b2"]


async def test_the_queue_is_bounded(
    group: GroupCommit[Any, Any], send: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUEUE_ROWS", 3)
    send.free.clear()
    small: GroupCommit[Any, Any] = GroupCommit(send, FakeClock(), key=str)
    tasks = put_all(small, range(9))
    await settle()
    assert small.waiting <= 3
    send.free.set()
    await settle()
    assert ended(tasks) == [f"did {row}" for row in range(9)]
    assert [row for batch in send.batches for row in batch] == list(range(9))


async def test_rows_of_cancelled_callers_count_for_the_bound(send: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_ROWS", 3)
    send.free.clear()
    small: GroupCommit[Any, Any] = GroupCommit(send, FakeClock(), key=str)
    for row in range(9):
        (task,) = put_all(small, [row])
        await settle()
        task.cancel()
        await settle()
    assert small.waiting <= 3
    send.free.set()


async def test_cancelled_callers_leave_no_gap(group: GroupCommit[Any, Any], send: Sender) -> None:
    send.free.clear()
    tasks = put_all(group, range(4))
    await settle()
    tasks += put_all(group, range(4, 8))
    await settle()
    for task in (tasks[0], tasks[5]):
        task.cancel()
    await settle()
    send.free.set()
    await settle()
    assert send.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(task.done() for task in tasks)


@pytest.mark.parametrize(
    "trouble",
    [
        ConnectionResetError(),
        TimeoutError(),
        asyncpg.CannotConnectNowError("starting"),
        asyncpg.AdminShutdownError("stopping"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_trouble_repeats_the_whole_statement(
    group: GroupCommit[Any, Any], send: Sender, clock: FakeClock, trouble: BaseException
) -> None:
    send.failures = [trouble]
    tasks = put_all(group, range(3))
    await clock.advance(1)
    assert len(send.batches) > 1
    assert all(batch == [0, 1, 2] for batch in send.batches)
    assert ended(tasks) == ["did 0", "did 1", "did 2"]


@pytest.mark.parametrize(
    "refusal",
    [asyncpg.CharacterNotInRepertoireError("NUL"), asyncpg.CheckViolationError("outcome")],
    ids=["nul", "check"],
)
async def test_a_guilty_row_fails_alone(
    group: GroupCommit[Any, Any], send: Sender, clock: FakeClock, refusal: BaseException
) -> None:
    send.guilty = {1: refusal}
    tasks = put_all(group, range(3))
    await clock.advance(1)
    assert send.batches == [[0, 1, 2], [0], [1], [2]]
    assert ended(tasks)[::2] == ["did 0", "did 2"]
    assert isinstance(ended(tasks)[1], PgmcpError)


async def test_patience_ends(group: GroupCommit[Any, Any], send: Sender, clock: FakeClock) -> None:
    send.failures = [ConnectionResetError()] * 100
    tasks = put_all(group, ["short"], patience=1) + put_all(group, ["long"], patience=5)
    await clock.advance(1.6)
    assert isinstance(ended(tasks)[0], DatabaseUnavailable)
    assert ended(tasks)[1] == "waits"
    await clock.advance(4)
    assert isinstance(ended(tasks)[1], DatabaseUnavailable)


async def test_after_an_outage_work_goes_on(group: GroupCommit[Any, Any], send: Sender, clock: FakeClock) -> None:
    send.failures = [ConnectionResetError()] * 5
    tasks = put_all(group, range(2))
    await clock.advance(3)
    tasks += put_all(group, range(2, 4))
    await settle()
    assert ended(tasks) == [f"did {row}" for row in range(4)]


async def test_the_gate_decides_for_every_row(send: Sender, clock: FakeClock) -> None:
    async def gate() -> None:
        message = "over"
        raise Fenced(message)

    tasks = put_all(GroupCommit(send, clock, key=str, gate=gate), range(3))
    await settle()
    assert [type(result) for result in ended(tasks)] == [Fenced] * 3
    assert send.batches == []


async def test_patience_ends_while_the_gate_waits(send: Sender) -> None:
    group: GroupCommit[Any, Any] = GroupCommit(send, Clock(), key=str, gate=asyncio.Event().wait)  # type: ignore[arg-type]
    (task,) = put_all(group, ["row"], patience=0.05)
    assert isinstance(await task, DatabaseUnavailable)
    assert send.batches == []


async def crash(
    group: GroupCommit[Any, Any], send: Sender, clock: FakeClock, *, first: BaseException | None
) -> list[Any]:
    """Let the statement fail with a bug of ours while others wait; what everybody got."""
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(context))
    send.free.clear()
    tasks = put_all(group, range(3))
    await settle()
    tasks += put_all(group, range(3, 5))
    await settle()
    send.failures = [first, ZeroDivisionError()] if first else [ZeroDivisionError()]
    send.free.set()
    await clock.advance(30)
    results = ended(tasks)
    for task in tasks:
        task.cancel()
    return results


async def test_a_crash_settles_its_statement(group: GroupCommit[Any, Any], send: Sender, clock: FakeClock) -> None:
    results = await crash(group, send, clock, first=None)
    assert [type(result) for result in results[:3]] == [PgmcpError] * 3


async def test_after_a_crash_the_queue_goes_on(group: GroupCommit[Any, Any], send: Sender, clock: FakeClock) -> None:
    results = await crash(group, send, clock, first=None)
    assert results[3:] == ["did 3", "did 4"]


async def test_a_crash_row_by_row_settles_everybody(
    group: GroupCommit[Any, Any], send: Sender, clock: FakeClock
) -> None:
    results = await crash(group, send, clock, first=asyncpg.CheckViolationError("row"))
    assert "waits" not in results


@pytest.mark.parametrize("where", ["_take", "_attempt", "_patient"])
async def test_an_error_of_its_own_ends_no_group(
    group: GroupCommit[Any, Any], send: Sender, clock: FakeClock, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for ever, and what comes after it is written."""
    real, broken = getattr(group, where), list[str]()

    def breaks(*args: Any, **more: Any) -> Any:
        if not broken:
            broken.append(where)
            raise KeyError(where)
        return real(*args, **more)

    setattr(group, where, breaks)
    if where == "_patient":
        send.failures = [OSError()]
    (first,) = put_all(group, [0])
    await clock.advance(1)
    assert broken
    assert isinstance(first.result(), PgmcpError)
    (second,) = put_all(group, [1])
    await clock.advance(1)
    assert second.result() == "did 1"
    assert "KeyError" in caplog.text


async def test_a_locked_row_holds_up_no_stranger(group: GroupCommit[Any, Any], send: Sender, clock: FakeClock) -> None:
    send.guilty = {0: asyncpg.LockNotAvailableError("lock timeout")}
    tasks = put_all(group, range(3))
    await clock.advance(1)
    assert ended(tasks) == ["waits", "did 1", "did 2"]
    met = send.batches.index([0, 1, 2])
    assert send.lock_waits[met : met + 4] == [LockWait.USUAL, *[LockWait.BRIEF] * 3]
    assert set(send.lock_waits[met + 4 :]) == {LockWait.USUAL}, "once it is parked it holds up nobody"
    for task in tasks:
        task.cancel()


async def test_contention_ends_with_the_patience(group: GroupCommit[Any, Any], send: Sender, clock: FakeClock) -> None:
    send.guilty = {0: asyncpg.LockNotAvailableError("lock timeout")}
    tasks = put_all(group, range(3), patience=4)
    await clock.advance(30)
    assert isinstance(ended(tasks)[0], DatabaseUnavailable)
    assert ended(tasks)[1:] == ["did 1", "did 2"]


@pytest.mark.parametrize("late", ["with it", "behind it", "after it was parked"])
async def test_rows_of_a_key_keep_their_order_when_one_meets_a_lock(clock: FakeClock, late: str) -> None:
    """Whether the second row was in the statement that met the lock, or waited behind it; the third comes meanwhile."""
    sent: list[str] = []
    locked, strangers = True, asyncio.Event()

    async def send(rows: Sequence[str], _: LockWait) -> list[str]:
        if "a1" in rows and locked:
            raise asyncpg.LockNotAvailableError("lock timeout")
        if "b1" in rows:
            await strangers.wait()
        sent.extend(rows)
        return list(rows)

    group: GroupCommit[str, str] = GroupCommit(send, clock, key=lambda row: row[0])
    rows = {"with it": ("a1", "b1", "a2"), "behind it": ("c1", "a1", "b1", "a2"), "after it was parked": ("a1", "b1")}
    tasks = [asyncio.create_task(group.put(row, patience=None)) for row in rows[late]]
    await settle()
    tasks += [asyncio.create_task(group.put(row, patience=None)) for row in ("a3", "a4")]
    await settle()
    strangers.set()
    await settle()
    locked = False
    await clock.advance(1)
    await asyncio.gather(*tasks)
    assert [row for row in sent if row[0] == "a"] == sorted(row for row in sent if row[0] == "a")


async def test_a_row_without_patience_is_never_dropped(
    group: GroupCommit[Any, Any], send: Sender, clock: FakeClock
) -> None:
    """Not after any time, nor when its caller has gone: the next row of its key would come before it."""
    send.failures = [ConnectionResetError()] * 200
    tasks = put_all(group, range(2), patience=None)
    await settle()
    tasks[0].cancel()
    await clock.advance(200)
    assert tasks[1].result() == "did 1"
    assert send.batches[-1] == [0, 1]


# With PostgreSQL: what is guilty there.


@pytest.mark.parametrize("field", ["session_id", "rpc_id", "method", "name"])
@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=["nul", "surrogate"])
async def test_a_poisoned_message_fails_alone(database: str, field: str, text: str) -> None:
    async with store(database) as node:
        session = await opened(node)
        good = [request(session, str(number)) for number in range(1, 5)]
        change: dict[str, Any] = {field: text}
        poisoned = replace(request(session, "5"), **change)
        calls = [node.inbox.accept([message]) for message in (good[0], good[1], poisoned, good[2], good[3])]
        results = await asyncio.gather(*(outcome(call) for call in calls))
        assert isinstance(results.pop(2), PgmcpError)
        assert [result.stream for result in results] == [message.stream for message in good]
        assert [item.key for item in await node.inbox.claim(session.ownership)] == [message.key for message in good]


async def test_an_unknown_session_fails_alone(database: str) -> None:
    async with store(database) as node:
        session = await opened(node)
        calls = [node.inbox.accept([request(name)]) for name in (session.session_id, "nobody")]
        known, unknown = await asyncio.gather(*(outcome(call) for call in calls))
        assert known.facts.session == session.key
        assert isinstance(unknown, SessionUnknown)


async def test_a_locked_session_holds_up_no_stranger(database: str) -> None:
    """A peer that freezes in the middle of a takeover keeps one session's row locked, not the whole node's inbox."""
    hand = await asyncpg.connect(database, timeout=10)
    try:
        async with store(database) as node:
            stuck, free = await opened(node), await opened(node)
            async with hand.transaction():
                await hand.execute(f"select from pgmcp.sessions where id = {stuck.key} for update")
                waits = asyncio.create_task(outcome(node.inbox.accept([request(stuck)])))
                passes = asyncio.create_task(outcome(node.inbox.accept([request(free)])))
                done, _ = await asyncio.wait({passes}, timeout=3)
            assert (await waits).facts.session == stuck.key
            await passes
            assert done == {passes}
            assert (await row_counts(hand))["requests"] == 2
    finally:
        await hand.close()


async def test_a_lock_that_is_held_for_a_moment_costs_nobody_anything(database: str) -> None:
    hand, eyes = [await asyncpg.connect(database, timeout=10) for _ in range(2)]
    try:
        async with store(database) as node:
            sessions = [await opened(node) for _ in range(3)]
            async with hand.transaction():
                await hand.execute(f"select from pgmcp.sessions where id = {sessions[1].key} for update")
                calls = [asyncio.create_task(node.inbox.accept([request(session)])) for session in sessions]
                await Watcher(eyes).until_waiting("accept", calls[1])
            results = await asyncio.gather(*calls)
            assert [result.facts.session for result in results] == [session.key for session in sessions]
            await check_streams(eyes)
    finally:
        await hand.close()
        await eyes.close()
