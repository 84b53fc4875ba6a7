"""Makes the actors of one host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pgmcp.clock import Clock, Ids
from pgmcp.inheritance import Inheritance
from pgmcp.ports import Inbox, Log
from pgmcp.session.actor import Actor
from pgmcp.session.adapter import Adapter
from pgmcp.session.message_limit import MessageLimit
from pgmcp.session.running_requests import ActorEnd
from pgmcp.session.state import KIND, SessionState
from pgmcp.types import JournalEntry, NodeId, Ownership, StreamId


@dataclass(frozen=True, slots=True)
class ActorFactory:
    """What all actors of a host have in common."""

    adapter: Adapter
    inbox: Inbox
    log: Log
    clock: Clock
    ids: Ids
    wake_sink: Callable[[NodeId, StreamId], None]
    on_over: Callable[[Actor, ActorEnd], None]
    message_limit: MessageLimit

    def make(
        self, ownership: Ownership, session_id: str, standalone: tuple[StreamId, int], left: Inheritance | None = None
    ) -> Actor:
        """A fresh actor, not started yet.

        Args:
            standalone: the session's standalone stream and its next number.
            left: what earlier owners left.
        """
        kept = {entry.detail: entry.body for entry in left.journal if entry.kind == KIND and entry.body} if left else {}

        async def keep(entry: JournalEntry) -> None:
            await actor.journal_writer.keep(entry)

        actor = Actor(
            ownership,
            SessionState(session_id, keep, restored=left is not None, kept=kept),
            standalone,
            adapter=self.adapter,
            inbox=self.inbox,
            log=self.log,
            clock=self.clock,
            ids=self.ids,
            message_limit=self.message_limit,
            wake_sink=self.wake_sink,
            version=None if left is None else left.version,
            on_over=self.on_over,
        )
        return actor
