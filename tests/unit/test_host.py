"""What a host makes of its sessions when the database's term changes while something else looks at them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from pgmcp.clock import Ids
from pgmcp.secret_box import SecretBox
from pgmcp.service import Faults
from pgmcp.session.actor import Actor
from pgmcp.session.adapter import Adapter, Conversation
from pgmcp.session.host import Host
from pgmcp.session.state import Hooks
from pgmcp.settings import Settings
from pgmcp.types import ANONYMOUS, JUMP, NewSession, NodeId, NodeState, Ownership, SessionKey, StreamId
from tests.harness.clock import FakeClock, settle
from tests.harness.memory import MemoryCluster, MemoryStore, memory_store

IDS = Ids()


class Server:
    """Says nothing."""

    hooks = Hooks()

    async def converse(self, session_id: str, conversation: Conversation) -> None:
        while await conversation.receive() is not None:
            pass


async def acting() -> None:
    return None


def host_of(store: MemoryStore, clock: FakeClock) -> Host:
    return Host(
        cast("Adapter", Server()),
        inbox=store.inbox,
        log=store.log,
        takeovers=store.takeovers,
        box=cast("SecretBox", None),
        settings=Settings(),
        clock=clock,
        ids=IDS,
        trusted=acting,
        wake_sink=lambda node, stream: None,
        tell_ended=lambda session: None,
        faults=Faults(),
    )


class Scene:
    """A node with one session."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.cluster = MemoryCluster(self.clock, Settings())
        self.store, self.other = (memory_store(self.cluster, self.clock, IDS) for _ in range(2))
        self.host = host_of(self.store, self.clock)

    async def open(self) -> Ownership:
        return await self.host.open(NewSession(IDS.token(), ANONYMOUS, "streamable", StreamId(IDS.uuid())))

    def term_begins(self) -> None:
        """The node has noticed, and does not yet know what becomes of its sessions."""
        self.cluster.begin_term()
        self.host.unsettled = True

    def actor(self, session: SessionKey) -> Actor:
        return self.host._residents[session].actor


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    await made.other.lease.join()
    await made.other.lease.set_state(NodeState.READY)
    yield made
    await made.host.stop()


async def test_what_is_heard_of_an_ownership_in_a_new_term_restores_nobody_who_goes_on(scene: Scene) -> None:
    """A touch that was held up finds that this node owns the session, before its sessions are in line with the term."""
    opened = await scene.open()
    actor = scene.actor(opened.session)
    scene.term_begins()
    (moved,) = await scene.store.inbox.owned()
    scene.host.take_on(moved)
    await scene.host.go_on(JUMP, lambda: True)
    await settle()
    await scene.host.poll()
    await settle()
    assert scene.actor(opened.session) is actor
    assert not actor.muted
    assert actor.ownership == moved


async def test_a_hand_over_that_a_term_overtakes_leaves_what_was_restored_meanwhile(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused in the new term, in which the session, whose actor was muted, is restored here."""
    opened = await scene.open()
    answered, hand_over = asyncio.Event(), scene.store.takeovers.hand_over

    async def late(ownership: Ownership, to: NodeId) -> Ownership | None:
        found = await hand_over(ownership, to)
        await answered.wait()
        return found

    scene.term_begins()
    monkeypatch.setattr(scene.store.takeovers, "hand_over", late)
    giving = asyncio.create_task(scene.host.hand_over(opened.session, scene.other.node, busy=True))
    await settle()
    await scene.host.go_on(JUMP, lambda: True)
    await settle()
    actor = scene.actor(opened.session)
    answered.set()
    assert await giving is None
    await settle()
    assert scene.actor(opened.session) is actor
    assert not actor.muted


async def test_who_gets_the_key_of_a_lost_session_takes_its_actors_place(scene: Scene) -> None:
    standby = scene.cluster.standby()
    lost = await scene.open()
    actor = scene.actor(lost.session)
    scene.cluster.fail_over(standby)
    scene.store.wire.timeline.follow()
    scene.host.unsettled = True
    opened = await scene.open()
    await scene.host.go_on(JUMP, lambda: True)
    assert opened == Ownership(lost.session, lost.epoch + JUMP)
    assert actor.muted
    assert not scene.actor(opened.session).muted


async def test_what_was_to_be_restored_later_is_restored_in_the_new_term(scene: Scene) -> None:
    opened = await scene.open()
    scene.host._again.add(opened)
    scene.host.drop(opened.session)
    scene.term_begins()
    await scene.host.go_on(JUMP, lambda: True)
    await scene.host.poll()
    await settle()
    assert scene.actor(opened.session).ownership == Ownership(opened.session, opened.epoch + JUMP)


async def test_a_look_for_strangers_that_a_term_overtakes_drops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line opens on the new primary and looks, while the sessions are brought in line with the term."""
    clock = FakeClock()
    cluster = MemoryCluster(clock, Settings())
    store = memory_store(cluster, clock, IDS)
    host = host_of(store, clock)
    opened = await host.open(NewSession(IDS.token(), ANONYMOUS, "streamable", StreamId(IDS.uuid())))
    answered, owned = asyncio.Event(), store.inbox.owned

    async def late() -> set[Ownership]:
        found = await owned()
        await answered.wait()
        return found

    cluster.begin_term()
    host.unsettled = True
    with monkeypatch.context() as patch:
        patch.setattr(store.inbox, "owned", late)
        look = asyncio.create_task(host.drop_strangers())
        await settle()
    await host.go_on(JUMP, lambda: True)
    answered.set()
    assert await look == {Ownership(opened.session, opened.epoch + JUMP)}
    assert host.has(opened.session)
    await host.stop()
