"""When the database goes on with another timeline: which sessions go on where they are, and which are restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest

from pgmcp.clock import Ids
from pgmcp.errors import DatabaseUnavailable
from pgmcp.session import timeline
from pgmcp.session.actor import Actor
from pgmcp.session.outbox import Outbox
from pgmcp.session.running_requests import Stream
from pgmcp.settings import Settings
from pgmcp.types import JUMP, Ownership, RequestKey, SessionKey, Stand, StreamId
from tests.harness.clock import FakeClock
from tests.harness.memory import MemoryCluster, memory_store
from tests.harness.stores import Session, opened, request

IDS = Ids()


class Living:
    """What is asked of an actor here; ``standing`` is the number of its standalone stream's next event."""

    def __init__(self, session: Session, working: set[RequestKey], standing: int = 1) -> None:
        self.ownership, self.alias = session.ownership, "n1-alias"
        self.outbox = Outbox(Stream(session.standalone, standing))
        self.working, self.muted = frozenset(working), False

    def go_on(self, ownership: Ownership, stands: Mapping[StreamId, Stand], jump: int) -> None:
        self.outbox.go_on(stands, jump)
        self.ownership = ownership


class Scene:
    """A node, whose database has every commit but those that a test says it has not."""

    def __init__(self) -> None:
        clock = FakeClock()
        self.cluster = MemoryCluster(clock, Settings())
        self.store = memory_store(self.cluster, clock, IDS)

    async def session(self, *rpc_ids: str) -> tuple[Session, list[RequestKey]]:
        """A session of this node, and its claimed requests."""
        session = await opened(self.store)
        for rpc_id in rpc_ids:
            await self.store.inbox.accept([request(session, rpc_id)])
        return session, [claimed.key for claimed in await self.store.inbox.claim(session.ownership)]

    async def go_on(self, *living: Living, lasts: bool = True) -> list[SessionKey]:
        """The sessions that cannot go on."""
        actors = [cast("Actor", each) for each in living]
        leaving, _ = await timeline.go_on(actors, self.store.inbox, self.store.log, JUMP, lambda: lasts)
        return leaving


@pytest.fixture
def scene() -> Scene:
    return Scene()


def later(session: Session) -> Ownership:
    return Ownership(session.key, session.ownership.epoch + JUMP)


async def test_an_actor_of_which_nothing_is_missing_goes_on_with_what_it_works_on(scene: Scene) -> None:
    session, (kept, other) = await scene.session("1", "2")
    living = Living(session, {kept})
    scene.cluster.begin_term()
    assert await scene.go_on(living) == []
    assert living.ownership == later(session)
    assert living.outbox.standalone.next_seq == 1 + JUMP
    assert [claimed.key for claimed in await scene.store.inbox.claim(later(session))] == [other]


@pytest.mark.parametrize("missing", ["an event", "a request", "the session"])
async def test_where_anything_is_missing_the_session_is_restored(scene: Scene, missing: str) -> None:
    session, (key,) = await scene.session("1")
    lost = RequestKey(IDS.uuid())
    living = Living(session, {key, lost} if missing == "a request" else {key}, 2 if missing == "an event" else 1)
    other, (own,) = await scene.session("1")
    whole = Living(other, {own})
    scene.cluster.begin_term()
    if missing == "the session":
        scene.cluster.forget(session.key)
    assert await scene.go_on(living, whole) == [session.key]
    assert (living.ownership, whole.ownership) == (session.ownership, later(other))
    if missing != "the session":
        assert await scene.store.inbox.claim(later(session)) == [], "nobody has said that it may run again"


async def test_an_actor_that_says_nothing_more_does_not_go_on(scene: Scene) -> None:
    session, _ = await scene.session()
    living = Living(session, set())
    living.muted = True
    scene.cluster.begin_term()
    assert await scene.go_on(living) == [session.key]


async def test_what_was_opened_in_the_term_is_let_be(scene: Scene) -> None:
    scene.cluster.begin_term()
    session, _ = await scene.session()
    living = Living(session, set())
    assert await scene.go_on(living) == []
    assert living.ownership == session.ownership


async def test_nobody_goes_on_into_a_history_that_is_over(scene: Scene) -> None:
    session, _ = await scene.session()
    living = Living(session, set())
    scene.cluster.begin_term()
    with pytest.raises(DatabaseUnavailable):
        await scene.go_on(living, lasts=False)
    assert living.ownership == session.ownership
