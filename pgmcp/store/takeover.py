"""Deaths and changes of owner.

Invariants:
- Death is one guarded statement in database time; a row that is dead or left never comes back to life.
- A change of owner locks the session's row ``FOR UPDATE`` and grows the epoch; what is in flight is read by statements
  that begin after it was committed, so that they see all that the former owner could store (G1).
- Restores and runs are counted before they are begun.

Failure handling: every statement finds its own work when it is repeated. A change of owner whose reply was lost is
found by ``Inbox.unclaimed`` of the new owner.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import asyncpg

from pgmcp.inheritance import Heard, Inheritance, Inherited
from pgmcp.store.database import Database
from pgmcp.store.encryption.payloads import CLEAR, Payloads, place_of_body, place_of_entry, place_of_event
from pgmcp.store.inbox import over
from pgmcp.store.rows import facts_of
from pgmcp.types import (
    Candidate,
    Change,
    Condemned,
    JournalEntry,
    NodeId,
    Ownership,
    RequestKey,
    SessionFacts,
    SessionKey,
    StreamId,
)

VERSION, EXPORT = "version", "export"
"""Kinds of entries of a journal: the number of its newest write, and what a server exported."""


class TableTakeovers:
    """The ``Takeovers`` port on PostgreSQL, for one node.

    Args:
        database: the node's pool.
        node: who declares deaths, and takes over.
        gate: awaited before each write of an owner; waits for trust, raises ``Fenced``.
        payloads: opens what is stored.
    """

    def __init__(
        self, database: Database, node: NodeId, gate: Callable[[], Awaitable[None]], payloads: Payloads = CLEAR
    ) -> None:
        self._database, self._node, self._gate, self._payloads = database, node, gate, payloads
        self._hold = database.settings.hold

    async def condemn(self, *, by_lease: bool, by_silence: bool) -> list[Condemned]:
        """See ``Takeovers.condemn``."""
        rows = await self._database.ask("condemn", self._node, by_lease, by_silence, self._database.settings.silence)
        return [Condemned(NodeId(row["node_id"]), row["name"], row["cause"]) for row in rows]

    async def take(self, session: SessionKey) -> SessionFacts | None:
        """See ``Takeovers.take``."""
        rows = await self._persist("take_session", session, self._node)
        return facts_of(rows[0], rows[0]["id"]) if rows else None

    async def take_orphans(self, most: int) -> list[Ownership]:
        """See ``Takeovers.take_orphans``."""
        rows = await self._database.ask("take_orphans", self._node, most)
        return [Ownership(SessionKey(row["id"]), row["epoch"]) for row in rows]

    async def ready_nodes(self) -> list[Candidate]:
        """See ``Takeovers.ready_nodes``."""
        rows = await self._database.ask("ready_nodes", self._node)
        return [Candidate(NodeId(row["node_id"]), row["version"], row["sessions"]) for row in rows]

    async def hand_over(self, ownership: Ownership, to: NodeId) -> Ownership | None:
        """See ``Takeovers.hand_over``."""
        rows = await self._persist("hand_over", ownership.session, self._node, ownership.epoch, to)
        return Ownership(ownership.session, rows[0]["epoch"]) if rows else None

    async def inherit(self, ownership: Ownership) -> Inheritance:
        """See ``Takeovers.inherit``."""
        session = ownership.session
        before = await self._persist("restores_begun", session)
        if not before:
            raise over(ownership)
        begun = await self._owner_write("begin_restore", ownership, before[0]["restores"])
        streams = await self._persist("inherited_streams", session)
        standalone = next((row for row in streams if row["kind"] == "standalone"), None)
        if not begun or standalone is None:
            raise over(ownership)
        journal = await self._persist("inherited_journal", session)
        opened, requests = self._payloads.open, []
        for row in await self._persist("inherited_requests", session, ownership.epoch):
            inherited = Inherited(
                key=RequestKey(row["id"]),
                position=row["position"],
                rpc_id=row["rpc_id"],
                method=row["method"],
                name=row["name"],
                body=await opened(row["body"], place_of_body(row["id"])),
                context=row["context"],
                stream=None if row["stream"] is None else StreamId(row["stream"]),
                next_seq=row["next_seq"] or 1,
                runs=row["runs"],
            )
            requests.append(inherited)
        spoken = {standalone["id"], *(request.stream for request in requests if request.stream is not None)}
        said = await self._persist("inherited_said", list(spoken))
        heard = await self._persist("inherited_heard", session)
        changed = await self._persist("inherited_changes", session)
        return Inheritance(
            session_id=begun[0]["session_id"],
            attempt=begun[0]["restores"],
            standalone=StreamId(standalone["id"]),
            next_seq=standalone["next_seq"],
            sinks=tuple((NodeId(row["sink"]), StreamId(row["id"])) for row in streams if row["sink"] is not None),
            journal=tuple(
                [await self._entry(session, row) for row in journal if row["kind"] != VERSION],
            ),
            version=next((int.from_bytes(row["body"], "big") for row in journal if row["kind"] == VERSION), 0),
            exported_at=next((row["written_at"] for row in journal if row["kind"] == EXPORT), None),
            requests=tuple(requests),
            heard=tuple(
                [
                    Heard(
                        row["position"],
                        row["method"],
                        await opened(row["body"], place_of_body(row["id"])),
                        row["claimed"],
                    )
                    for row in heard
                ]
            ),
            said=tuple(
                [
                    (StreamId(row["stream"]), await opened(row["message"], place_of_event(row["stream"], row["seq"])))
                    for row in said
                ]
            ),
            changed=tuple(Change(row["kind"]) for row in changed),
        )

    async def _entry(self, session: SessionKey, row: asyncpg.Record) -> JournalEntry:
        entry = JournalEntry(row["kind"], row["detail"])
        return replace(entry, body=await self._payloads.open(row["body"], place_of_entry(session, entry)))

    async def adopt(self, ownership: Ownership, runs: Sequence[tuple[RequestKey, int]]) -> None:
        """See ``Takeovers.adopt``."""
        rows = await self._owner_write("adopt", ownership, [key for key, _ in runs], [count for _, count in runs])
        if not rows:
            raise over(ownership)

    async def restored(self, ownership: Ownership, left: Inheritance) -> None:
        """See ``Takeovers.restored``."""
        await self._owner_write("end_restore", ownership, left.attempt, left.exported_at)

    async def _owner_write(self, name: str, ownership: Ownership, *args: object) -> list[asyncpg.Record]:
        fence = (ownership.session, self._node, ownership.epoch)
        return await self._database.persist(name, *fence, *args, patience=self._hold, gate=self._gate)

    async def _persist(self, name: str, *args: object) -> list[asyncpg.Record]:
        return await self._database.persist(name, *args, patience=self._hold)
