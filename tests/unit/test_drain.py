"""The drain on fake ports: whom it gives sessions to, what it waits for, and when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from pgmcp.clock import Ids
from pgmcp.cluster.drain import LAST_SECONDS, PAUSE_SECONDS, Drain, newest
from pgmcp.errors import DatabaseUnavailable
from pgmcp.ports import Takeovers
from pgmcp.types import Candidate, NodeId, Ownership, SessionKey
from tests.harness.clock import FakeClock, settle

IDS = Ids()
FIRST, SECOND, THIRD = (NodeId(IDS.uuid()) for _ in range(3))
LIMIT = 20.0


def key(number: int) -> SessionKey:
    return SessionKey(number)


class Scene:
    """A node with sessions that the test keeps busy, peers that it makes ready, and a database that it takes away."""

    def __init__(self, *sessions: int) -> None:
        self.clock = FakeClock()
        self.here = {key(number) for number in sessions}
        self.busy: set[SessionKey] = set()
        self.stuck: set[SessionKey] = set()
        self.ready: list[Candidate] = [Candidate(FIRST, "1.0", 0)]
        self.refusing: set[NodeId] = set()
        self.away = self.held = False
        self.waiting = self.looks = 0
        self.takes = 0.0
        self.shuts: list[float] = []
        self.came_late: SessionKey | None = None
        self.moved: dict[SessionKey, NodeId] = {}
        self.asked: list[tuple[SessionKey, NodeId, bool]] = []
        self.told: list[tuple[NodeId, Ownership]] = []
        self.drain = Drain(
            self,
            cast("Takeovers", self),
            self.clock,
            waiting=lambda: self.waiting,
            wake_new_owner=lambda node, ownership: self.told.append((node, ownership)),
        )
        self.task: asyncio.Task[None] | None = None

    @property
    def sessions(self) -> int:
        return len(self.here)

    def hold(self) -> None:
        self.held = True

    def movable(self, *, busy: bool) -> list[SessionKey]:
        return sorted(self.here - self.stuck if busy else self.here - self.stuck - self.busy)

    async def hand_over(self, session: SessionKey, to: NodeId, *, busy: bool) -> Ownership | None:
        self.asked.append((session, to, busy))
        if self.takes:
            await self.clock.sleep(self.takes)
        if to in self.refusing:
            return None
        self.here.discard(session)
        self.moved[session] = to
        return Ownership(session, 2)

    async def ready_nodes(self) -> list[Candidate]:
        self.looks += 1
        if self.away:
            message = "away"
            raise DatabaseUnavailable(message)
        return [candidate for candidate in self.ready if candidate.node not in self.refusing]

    def start(self) -> None:
        self.task = asyncio.create_task(self.drain.run(LIMIT, self.shut))

    async def shut(self) -> None:
        self.shuts.append(self.clock.now - 1000)
        if self.came_late is not None:
            self.here.add(self.came_late)

    @property
    def over(self) -> bool:
        assert self.task is not None
        return self.task.done() and self.task.exception() is None


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene(1, 2, 3)
    yield made
    if made.task is not None:
        made.task.cancel()


async def test_idle_sessions_go_at_once_and_their_owners_are_told(scene: Scene) -> None:
    scene.start()
    await scene.clock.advance(PAUSE_SECONDS)
    assert scene.over
    assert scene.moved == {key(number): FIRST for number in (1, 2, 3)}
    assert sorted(ownership.session for _, ownership in scene.told) == [1, 2, 3]
    assert {node for node, _ in scene.told} == {FIRST}
    assert not scene.held
    assert len(scene.shuts) == 1


async def test_a_node_without_sessions_and_exchanges_does_not_wait() -> None:
    empty = Scene()
    empty.start()
    await settle()
    assert empty.over
    assert empty.looks == 0


@pytest.mark.parametrize(
    ("versions", "best"),
    [
        (("0.9", "0.10", "0.2"), {1}),
        (("1.0", "1.0", "0.9"), {0, 1}),
        (("1.0", "1.0.1", "1.0"), {1}),
        (("", "0.1", ""), {1}),
        (("2", "10", "9"), {1}),
    ],
)
def test_the_newest_build_comes_first(versions: tuple[str, ...], best: set[int]) -> None:
    candidates = [Candidate(NodeId(IDS.uuid()), version, 0) for version in versions]
    assert newest(candidates) == [candidates[number] for number in sorted(best)]
    assert newest([]) == []


async def test_the_least_loaded_comes_first_and_gets_heavier(scene: Scene) -> None:
    scene.here = {key(number) for number in range(1, 101)}
    scene.ready = [Candidate(FIRST, "1.0", 70), Candidate(SECOND, "1.0", 30), Candidate(THIRD, "0.9", 0)]
    scene.start()
    await scene.clock.advance(PAUSE_SECONDS)
    assert scene.over
    given = list(scene.moved.values())
    assert {node: given.count(node) for node in (FIRST, SECOND, THIRD)} == {FIRST: 30, SECOND: 70, THIRD: 0}


async def test_busy_sessions_wait_until_they_are_idle(scene: Scene) -> None:
    scene.busy = {key(2)}
    scene.start()
    await scene.clock.advance(5)
    assert set(scene.moved) == {1, 3}
    scene.busy.clear()
    await scene.clock.advance(2 * PAUSE_SECONDS)
    assert scene.over
    assert all(not busy for _, _, busy in scene.asked)


@pytest.mark.parametrize("what", ["session", "exchange"])
async def test_nothing_new_begins_in_the_second_half(scene: Scene, what: str) -> None:
    scene.busy, scene.waiting = ({key(2)}, 0) if what == "session" else (set(), 1)
    scene.start()
    await scene.clock.advance(LIMIT / 2 - PAUSE_SECONDS)
    assert (scene.held, scene.shuts) == (False, [])
    await scene.clock.advance(3 * PAUSE_SECONDS)
    assert scene.held
    assert scene.shuts == [pytest.approx(LIMIT / 2, abs=2 * PAUSE_SECONDS)]
    await scene.clock.advance(LIMIT / 2 + LAST_SECONDS)
    assert scene.over
    assert len(scene.shuts) == 1


async def test_what_came_in_until_the_port_was_closed_is_given_away_too(scene: Scene) -> None:
    scene.came_late = key(4)
    scene.start()
    await scene.clock.advance(3 * PAUSE_SECONDS)
    assert scene.over
    assert scene.moved[key(4)] == FIRST


async def test_at_the_limit_busy_sessions_move_as_they_are(scene: Scene) -> None:
    scene.busy = {key(2)}
    scene.start()
    await scene.clock.advance(LIMIT - 2 * PAUSE_SECONDS)
    assert not scene.over
    await scene.clock.advance(3 * PAUSE_SECONDS)
    assert scene.over
    assert scene.asked[-1] == (2, FIRST, True)
    assert set(scene.moved) == {1, 2, 3}


async def test_what_cannot_move_at_all_ends_the_drain_at_the_limit(scene: Scene) -> None:
    scene.stuck = {key(2)}
    scene.start()
    await scene.clock.advance(LIMIT + LAST_SECONDS + 2 * PAUSE_SECONDS)
    assert scene.over
    assert scene.here == {2}


async def test_a_slow_hand_over_does_not_outlast_the_limit(scene: Scene) -> None:
    scene.here = {key(number) for number in range(1, 1001)}
    scene.takes = 1.0  # sixteen at a time
    scene.start()
    await scene.clock.advance(LIMIT + 2 * LAST_SECONDS + 2)
    assert scene.over
    assert 320 <= len(scene.moved) <= 400


async def test_exchanges_that_cannot_resume_are_waited_for_up_to_the_limit(scene: Scene) -> None:
    scene.waiting = 1
    scene.start()
    await scene.clock.advance(LIMIT - 1)
    assert not scene.over
    assert scene.sessions == 0
    await scene.clock.advance(1 + LAST_SECONDS + 2 * PAUSE_SECONDS)
    assert scene.over


async def test_without_a_ready_node_it_leaves_when_nothing_works(scene: Scene) -> None:
    scene.ready, scene.busy, scene.waiting = [], {key(1)}, 1
    scene.start()
    await scene.clock.advance(LIMIT / 2 + 1)
    assert not scene.over
    assert (scene.held, scene.shuts) == (False, []), "nobody else would do what is held back"
    scene.busy.clear()
    await scene.clock.advance(1)
    assert not scene.over
    scene.waiting = 0
    await scene.clock.advance(PAUSE_SECONDS)
    assert scene.over
    assert scene.sessions == 3
    assert scene.asked == []


async def test_a_node_that_comes_meanwhile_is_given_sessions(scene: Scene) -> None:
    ready, scene.ready, scene.busy = scene.ready, [], {key(1)}
    scene.start()
    await scene.clock.advance(3)
    assert scene.moved == {}
    scene.ready = ready
    await scene.clock.advance(2 * PAUSE_SECONDS)
    assert set(scene.moved) == {2, 3}


async def test_who_refuses_is_not_asked_again_while_others_are_ready(scene: Scene) -> None:
    scene.ready = [Candidate(FIRST, "1.0", 0), Candidate(SECOND, "1.0", 50)]

    async def leaving(session: SessionKey, to: NodeId, *, busy: bool) -> Ownership | None:
        scene.refusing.add(FIRST)  # between the look and the hand-over
        return await Scene.hand_over(scene, session, to, busy=busy)

    cast("Any", scene).hand_over = leaving
    scene.here = {key(number) for number in range(1, 41)}
    scene.start()
    await scene.clock.advance(3 * PAUSE_SECONDS)
    assert scene.over
    assert set(scene.moved.values()) == {SECOND}
    assert sum(to == FIRST for _, to, _ in scene.asked) <= 16, "those that were on their way"


async def test_while_the_database_is_away_it_waits_and_goes_on(scene: Scene) -> None:
    scene.away = True
    scene.start()
    await scene.clock.advance(LIMIT / 2 + 1)
    assert not scene.over
    assert not scene.held
    scene.away = False
    await scene.clock.advance(2 * PAUSE_SECONDS)
    assert scene.over
    assert set(scene.moved) == {1, 2, 3}


async def test_a_database_that_stays_away_does_not_keep_the_node(scene: Scene) -> None:
    scene.away = True
    scene.start()
    await scene.clock.advance(LIMIT + LAST_SECONDS + 2 * PAUSE_SECONDS)
    assert scene.over
    assert scene.sessions == 3
