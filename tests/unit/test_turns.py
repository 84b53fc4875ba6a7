"""A session that floods waits for itself: who gets which slot, in which order, and that every slot comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.requests import ClientDisconnect

from pgmcp.clock import Clock
from pgmcp.errors import NodeNotReady, SessionBusy
from pgmcp.types import ANONYMOUS
from pgmcp.web.admission import ALONE_SECONDS, MOST, SHARE, SLOTS, Admission, Caller, Kind
from tests.harness.clock import FakeClock, settle
from tests.harness.waiting import eventually

LONG = 3600.0


class Exchanges:
    """Exchanges that last until the test ends them; ``begun`` and ``running`` are in the order of their turns."""

    def __init__(self, clock: Clock | None = None, young: float = LONG) -> None:
        self.admission = Admission(clock or FakeClock(), young)
        self.begun: list[str] = []
        self.running: dict[str, asyncio.Event] = {}
        self.gone: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(
        self, *names: str, kind: Kind = "requests", most: int = 100, patience: float = LONG, of: str = "one"
    ) -> None:
        """Begin exchanges of one caller; the session of ``a1`` is ``a``."""
        for name in names:
            self.gone[name] = asyncio.Event()
            work = self._exchange(Caller(ANONYMOUS, of), name, kind=kind, most=most, patience=patience)
            self.tasks[name] = asyncio.create_task(work)
        await settle()

    async def _exchange(self, caller: Caller, name: str, *, kind: Kind, most: int, patience: float) -> None:
        async def receive() -> dict[str, str]:
            await self.gone[name].wait()
            return {"type": "http.disconnect"}

        async with self.admission.turn(caller, name[0], receive, kind=kind, most=most, patience=patience):
            self.begun.append(name)
            self.running[name] = asyncio.Event()
            try:
                await self.running[name].wait()
            finally:
                del self.running[name]

    async def end(self, name: str) -> None:
        """End one exchange."""
        self.running[name].set()
        await settle()

    async def all_end(self) -> None:
        """End one exchange after another, always the oldest, until there is none."""
        while self.running:
            await self.end(next(iter(self.running)))


@pytest.fixture
async def exchanges() -> AsyncIterator[Exchanges]:
    exchanges = Exchanges()
    yield exchanges
    await exchanges.all_end()
    await asyncio.gather(*exchanges.tasks.values(), return_exceptions=True)
    assert (exchanges.admission.free, len(exchanges.admission)) == (SLOTS, 0)
    assert exchanges.admission.callers == 0


def many(session: str, count: int) -> list[str]:
    return [f"{session}{number}" for number in range(count)]


async def test_a_flood_waits_for_itself_only(exchanges: Exchanges) -> None:
    await exchanges.begin("b0", *many("a", 50))
    assert exchanges.begun == ["b0", *many("a", SHARE)]
    await exchanges.begin(*many("c", SHARE))
    assert exchanges.begun[-SHARE:] == many("c", SHARE)
    assert len(exchanges.admission) == 50 - SHARE


async def test_lines_take_turns_when_every_slot_is_held(exchanges: Exchanges) -> None:
    floods = "abcdef"
    for session in floods:
        await exchanges.begin(*many(session, 30))
    assert len(exchanges.running) == SLOTS
    await exchanges.begin("x0", "x1")
    ended = 0
    while "x0" not in exchanges.begun:
        await exchanges.end(next(iter(exchanges.running)))
        ended += 1
    assert ended <= len(floods) + 1  # one turn of each line
    while "x1" not in exchanges.begun:
        await exchanges.end(next(iter(exchanges.running)))
        ended += 1
    assert ended <= 2 * (len(floods) + 1)


async def test_a_line_keeps_its_order(exchanges: Exchanges) -> None:
    await exchanges.begin("b0", *many("a", 50), *many("b", 50)[1:])
    await exchanges.all_end()
    for session in "ab":
        assert [name for name in exchanges.begun if name[0] == session] == many(session, 50)


async def test_cancels_and_answers_wait_behind_no_request_but_a_flood_of_them_waits(exchanges: Exchanges) -> None:
    await exchanges.begin("b0", *many("a", 50))
    notes = [f"a-note{number}" for number in range(50)]
    await exchanges.begin(*notes, kind="messages")
    assert [name for name in exchanges.begun if name in notes] == notes[:SHARE]


async def test_a_caller_with_many_sessions_waits_for_itself_only(exchanges: Exchanges) -> None:
    """Whether they are sessions, nobody knows yet: the ids may be made up."""
    await exchanges.begin("x0", of="two")
    await exchanges.end("x0")
    names = [f"{chr(ord('a') + session)}{number}" for number in range(2) for session in range(20)]
    await exchanges.begin(*names)
    assert len(exchanges.running) == MOST
    await exchanges.begin("x1", of="two")
    assert "x1" in exchanges.running
    assert exchanges.begun == ["x0", *names[:MOST], "x1"]


async def test_callers_take_turns_when_every_slot_is_held(exchanges: Exchanges) -> None:
    await exchanges.begin("x0", of="two")
    await exchanges.end("x0")
    await exchanges.begin(*[f"{chr(ord('a') + session)}0" for session in range(26)])
    await exchanges.begin(*many("y", SHARE), *many("z", SHARE), of="three")
    assert len(exchanges.running) == SLOTS
    await exchanges.begin("x1", "x2", of="two")
    turns = 0
    while "x2" not in exchanges.begun:
        await exchanges.end(next(iter(exchanges.running)))
        turns += 1
    assert turns <= 2 * 3  # two turns of each caller, however many lines the others have


async def test_a_stranger_waits_in_no_line_of_a_session_that_he_names(exchanges: Exchanges) -> None:
    await exchanges.begin(*many("a", SHARE + 3), of="two")
    await exchanges.begin("a-mine")
    assert "a-mine" in exchanges.running


async def test_large_bodies_have_a_line_of_their_own(exchanges: Exchanges) -> None:
    await exchanges.begin("b0", *many("a", 50), kind="large")
    await exchanges.begin("a-small")
    assert "a-small" in exchanges.running


async def test_who_is_alone_for_long_may_have_every_slot() -> None:
    clock = FakeClock()
    exchanges = Exchanges(clock)
    await exchanges.begin(*many("a", 50))
    assert len(exchanges.running) == SLOTS  # nobody else was here ever
    await exchanges.begin("b0")
    assert "b0" not in exchanges.running
    await exchanges.end("a0")
    assert "b0" in exchanges.running
    for name in many("a", SLOTS + 1)[1:SLOTS]:
        await exchanges.end(name)
    assert len(exchanges.running) == SHARE + 1
    await exchanges.end("b0")
    await exchanges.begin("a50")
    clock.now += ALONE_SECONDS + 1
    assert len(exchanges.running) == SHARE
    await exchanges.begin("a51")
    assert len(exchanges.running) == SLOTS
    await exchanges.all_end()


async def test_long_calls_hold_no_slot() -> None:
    exchanges = Exchanges(young=0.001)
    await exchanges.begin("b0", *many("a", 50))
    await eventually(lambda: len(exchanges.running) == 51, "all of them run")
    await eventually(lambda: exchanges.admission.free == SLOTS, "none of them holds a slot")
    await exchanges.all_end()
    assert exchanges.admission.free == SLOTS  # and none gives it back twice


async def test_who_goes_away_leaves_its_place(exchanges: Exchanges) -> None:
    await exchanges.begin("b0", *many("a", SHARE + 3))
    first, second, third = many("a", SHARE + 3)[-3:]
    exchanges.gone[first].set()
    exchanges.tasks[second].cancel()
    await settle()
    with pytest.raises(ClientDisconnect):
        await exchanges.tasks[first]
    assert len(exchanges.admission) == 1
    await exchanges.end("a0")
    assert third in exchanges.running


@pytest.mark.parametrize("turns", range(4))
async def test_a_slot_that_is_given_to_whom_just_goes_is_passed_on(exchanges: Exchanges, turns: int) -> None:
    await exchanges.begin("b0", *many("a", SHARE + 2))
    leaving, next_one = many("a", SHARE + 2)[-2:]
    exchanges.running["a0"].set()
    for _ in range(turns):
        await asyncio.sleep(0)
    exchanges.tasks[leaving].cancel()
    await settle()
    assert leaving not in exchanges.running
    assert next_one in exchanges.running


async def test_waiting_is_bounded(exchanges: Exchanges) -> None:
    await exchanges.begin("b0", *many("a", SHARE + 5), most=5)
    await exchanges.begin("a-more", most=5)
    with pytest.raises(SessionBusy, match="5 messages"):
        await exchanges.tasks["a-more"]
    await exchanges.begin("a-late", patience=0.001)
    with pytest.raises(NodeNotReady, match="try again"):
        await exchanges.tasks["a-late"]
    assert len(exchanges.admission) == 5


async def test_guests_wait_on_when_the_sessions_of_a_node_go_elsewhere() -> None:
    admission, let_go = Admission(FakeClock(), LONG), asyncio.Event()
    turns: list[str] = []

    async def never() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def exchange(session: str | None, name: str) -> None:
        async with admission.turn(Caller(ANONYMOUS, "a"), session, never, kind="requests", most=100, patience=LONG):
            turns.append(name)
            await let_go.wait()

    first = [asyncio.create_task(exchange(f"{number}", "first")) for number in range(SLOTS)]
    await settle()
    waiting = [asyncio.create_task(exchange(*who)) for who in (("session", "s"), (None, "g"))]
    await settle()
    admission.leave()
    let_go.set()
    assert isinstance((await asyncio.gather(*waiting, return_exceptions=True))[0], NodeNotReady)
    await asyncio.gather(*first)
    assert turns[SLOTS:] == ["g"]


async def test_a_node_that_leaves_keeps_nobody_waiting(exchanges: Exchanges) -> None:
    await exchanges.begin("b0", *many("a", SHARE + 1))
    exchanges.admission.leave()
    with pytest.raises(NodeNotReady, match="leaving"):
        await exchanges.tasks[f"a{SHARE}"]
