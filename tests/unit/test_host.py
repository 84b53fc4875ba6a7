"""What a host makes of its sessions when the database's term changes while something else looks at them."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from pgmcp.clock import Ids
from pgmcp.secret_box import SecretBox
from pgmcp.service import Faults
from pgmcp.session.adapter import Adapter, Conversation
from pgmcp.session.host import Host
from pgmcp.session.state import Hooks
from pgmcp.settings import Settings
from pgmcp.types import ANONYMOUS, JUMP, NewSession, Ownership, StreamId
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
