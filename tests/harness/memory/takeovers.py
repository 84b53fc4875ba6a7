"""The ``Takeovers``, ``LeaseTable`` and ``Notifier`` ports in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pgmcp.errors import DatabaseUnavailable, Fenced
from pgmcp.inheritance import Heard, Inheritance, Inherited
from pgmcp.types import (
    LISTS,
    Candidate,
    Condemned,
    JournalEntry,
    NodeId,
    NodeState,
    Ownership,
    RequestKey,
    SessionFacts,
    SessionKey,
    StreamId,
)
from tests.harness.memory.tables import LIVING, NodeRow, RequestRow, SessionRow
from tests.harness.memory.wire import Wire

SAID = (b'"notifications/cancelled"', b'"notifications/progress"')


class MemoryTakeovers:
    """One node's part in deaths and changes of owner."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._cluster, self._node = wire, wire.cluster, wire.node

    async def condemn(self, *, by_lease: bool, by_silence: bool) -> list[Condemned]:
        return await self._wire.ask("condemn", lambda: self._condemn(by_lease, by_silence))

    def _condemn(self, by_lease: bool, by_silence: bool) -> list[Condemned]:
        found: list[Condemned] = []
        me = self._cluster.nodes.get(self._node)
        if me is None or me.state not in LIVING or self._silent(me):
            return found
        for row in self._cluster.nodes.values():
            cause = self._cause(row, by_lease, by_silence)
            if cause is not None:
                row.state, row.cause = NodeState.DEAD, cause
                self._cluster.died(row.node)
                found.append(Condemned(row.node, "node", cause))
        return found

    def _cause(self, row: NodeRow, by_lease: bool, by_silence: bool) -> str | None:
        now = self._cluster.now()
        if row.node == self._node or row.state not in LIVING:
            return None
        if by_lease and row.expires_at < now:
            return "lease"
        if by_silence and self._silent(row) and row.line is not None and row.line not in self._cluster.lines:
            return "lease" if row.expires_at < now else "silence"
        return None

    def _silent(self, row: NodeRow) -> bool:
        return row.renewed_at < self._cluster.now() - self._cluster.settings.silence

    async def take(self, session: SessionKey) -> SessionFacts | None:
        return await self._wire.persist("take_session", lambda: self._take(session))

    def _take(self, session: SessionKey) -> SessionFacts | None:
        row = self._cluster.sessions.get(session)
        if row is None:
            return None
        if self._cluster.ready(self._node) and not self._cluster.lives(row.owner):
            self._change(row)
        return self._cluster.facts(row, orphaned=not self._cluster.lives(row.owner))

    def _change(self, row: SessionRow) -> Ownership:
        former = self._cluster.nodes.get(row.owner)
        self._cluster.change_owner(row, self._node, "removed" if former is None else former.cause or former.state)
        return row.ownership

    async def take_orphans(self, most: int) -> list[Ownership]:
        return await self._wire.ask("take_orphans", lambda: self._take_orphans(most))

    def _take_orphans(self, most: int) -> list[Ownership]:
        if not self._cluster.ready(self._node):
            return []
        orphans = [
            row
            for row in self._cluster.sessions.values()
            if row.owner in self._cluster.nodes and not self._cluster.lives(row.owner) and self._is_wanted(row.id)
        ]
        return [self._change(row) for row in sorted(orphans, key=lambda row: row.id)[:most]]

    def _is_wanted(self, session: SessionKey) -> bool:
        return (
            any(not row.finished for row in self._cluster.requests_of(session))
            or any(not row.closed and self._cluster.lives(row.sink) for row in self._cluster.streams_of(session))
            or any(key[:2] == (session, "subscription") for key in self._cluster.journal)
        )

    async def ready_nodes(self) -> list[Candidate]:
        return await self._wire.ask("ready_nodes", self._ready_nodes)

    def _ready_nodes(self) -> list[Candidate]:
        owners = [row.owner for row in self._cluster.sessions.values()]
        others = [node for node in self._cluster.nodes if node != self._node and self._cluster.ready(node)]
        return [Candidate(node, "", owners.count(node)) for node in others]

    async def hand_over(self, ownership: Ownership, to: NodeId) -> Ownership | None:
        return await self._wire.persist("hand_over", lambda: self._give(ownership, to))

    def _give(self, ownership: Ownership, to: NodeId) -> Ownership | None:
        row = self._cluster.sessions.get(ownership.session)
        if row is not None and (row.owner, row.epoch) == (to, ownership.epoch + 1):
            return row.ownership
        row = self._cluster.owned_by(self._node, ownership)
        if row is None or not self._cluster.ready(to):
            return None
        self._cluster.change_owner(row, to, "drain")
        return row.ownership

    async def inherit(self, ownership: Ownership) -> Inheritance:
        before = await self._wire.persist("restores_begun", lambda: self._fence(ownership).restores)
        begun = await self._wire.persist("begin_restore", lambda: self._begin(ownership, before), gated=True)
        return await self._wire.persist("inherited_requests", lambda: self._read(ownership, begun))

    def _begin(self, ownership: Ownership, before: int) -> int:
        row = self._fence(ownership)
        row.restores = before + 1
        self._cluster.stored(self._node, "begin_restore", ownership)
        return row.restores

    def _fence(self, ownership: Ownership) -> SessionRow:
        row = self._cluster.owned_by(self._node, ownership)
        if row is None:
            message = f"Session {ownership.session} has another owner or is over."
            raise Fenced(message)
        return row

    def _read(self, ownership: Ownership, attempt: int) -> Inheritance:
        cluster, session = self._cluster, ownership.session
        standalone, row = cluster.standalone_of(session), cluster.sessions.get(session)
        if standalone is None or row is None:
            message = f"Session {session} is over."
            raise Fenced(message)
        requests = [item for item in cluster.requests_of(session) if self._may_have_run(item, ownership.epoch)]
        spoken = {standalone.id, *(item.message.stream for item in requests if item.message.stream)}
        return Inheritance(
            session_id=row.session_id,
            attempt=attempt,
            standalone=standalone.id,
            next_seq=standalone.next_seq,
            sinks=tuple((stream.sink, stream.id) for stream in cluster.streams_of(session) if stream.sink is not None),
            journal=tuple(
                JournalEntry(kind, detail, body)
                for (of, kind, detail), body in cluster.journal.items()
                if of == session
            ),
            requests=tuple(self._inherited(item) for item in requests),
            heard=tuple(
                Heard(item.position, item.message.method, item.message.body, item.claimed_epoch is not None)
                for item in reversed(list(cluster.requests_of(session)))
                if item.message.rpc_id is None
                and item.message.method in {None, "notifications/cancelled", "notifications/initialized"}
            ),
            said=tuple((stream, text) for stream in spoken for text in self._said(stream)),
            changed=tuple(
                {
                    found.publication.change
                    for found in cluster.publications
                    if found.publication.change in LISTS and found.published_at >= row.created_at
                }
            ),
            version=row.version,
        )

    def _may_have_run(self, row: RequestRow, epoch: int) -> bool:
        if row.message.rpc_id is None or row.finished:
            return False
        if row.claimed_epoch is None:
            return row.accepted_at < self._cluster.started_at or row.position <= self._cluster.term_position
        return row.claimed_epoch <= epoch

    def _inherited(self, row: RequestRow) -> Inherited:
        message, stream = row.message, self._cluster.streams.get(row.message.stream) if row.message.stream else None
        return Inherited(
            row.key, row.position, message.rpc_id or "", message.method or "", message.name, message.body,
            message.context, message.stream, 1 if stream is None else stream.next_seq, row.runs,
        )  # fmt: skip

    def _said(self, stream: StreamId) -> list[bytes]:
        """Questions, cancels and progress on a stream, the newest first."""
        events = self._cluster.streams[stream].events
        texts = [events[seq][0] for seq in sorted(events, reverse=True)]
        return [
            text for text in texts if (b'"id":' in text and b'"method":' in text) or any(word in text for word in SAID)
        ]

    async def adopt(self, ownership: Ownership, runs: Sequence[tuple[RequestKey, int]]) -> None:
        def work() -> None:
            self._fence(ownership)
            for key, count in runs:
                row = self._cluster.requests.get(key)
                if row is not None and not row.finished and row.runs <= count:
                    row.claimed_epoch, row.runs = ownership.epoch, count
            self._cluster.stored(self._node, "adopt", ownership)

        await self._wire.persist("adopt", work, gated=True)

    async def restored(self, ownership: Ownership, left: Inheritance) -> None:
        exported = next((entry.body for entry in left.journal if entry.kind == "export"), None)

        def work() -> None:
            row = self._cluster.owned_by(self._node, ownership)
            if row is not None and row.restores in {0, left.attempt}:
                row.restores = 0
                place = (ownership.session, "export", "")
                if self._cluster.journal.get(place) is exported:
                    self._cluster.journal.pop(place, None)
                self._cluster.stored(self._node, "end_restore", ownership)

        await self._wire.persist("end_restore", work, gated=True)


class MemoryLeaseTable:
    """One node's row and line."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._cluster, self._node = wire, wire.cluster, wire.node
        self._line: int | None = None

    async def join(self) -> None:
        """Write the row of a node that joins; a repeat finds it."""

        def work() -> None:
            now = self._cluster.now()
            row = NodeRow(self._node, NodeState.JOINING, now, now + self._cluster.settings.ttl)
            self._cluster.nodes.setdefault(self._node, row)

        await self._wire.persist("join", work)

    async def renew(self) -> float | None:
        if self._line is not None and self._line not in self._cluster.lines:
            message = "The line is gone."
            raise DatabaseUnavailable(message)
        return await self._wire.ask("renew", self._renew)

    def _renew(self) -> float | None:
        row = self._cluster.nodes.get(self._node)
        if row is None or row.state not in LIVING:
            return None
        row.renewed_at = self._cluster.now()
        row.expires_at = row.renewed_at + self._cluster.settings.ttl
        row.line = self._cluster.channels.get(self._node)
        return row.renewed_at

    async def set_state(self, state: NodeState) -> bool:
        def work() -> bool:
            order = list(NodeState)
            if not self._cluster.lives(self._node) or order.index(self._cluster.nodes[self._node].state) > order.index(
                state
            ):
                return False
            self._cluster.nodes[self._node].state = state
            return True

        return await self._wire.ask("set_state", work)

    def listen(self, hear: Callable[[str], None]) -> None:
        """Open a line."""
        self._line = self._cluster.channels[self._node] = self._cluster.line_number()
        self._cluster.lines[self._line] = hear

    def notice(self) -> None:
        """The node sees that its line is gone, and renews on the pool meanwhile."""
        self._line = None

    def hang_up(self) -> None:
        """The line's backend is gone; the row still names it until the next renewal."""
        line = self._cluster.channels.pop(self._node, None)
        if line is not None:
            del self._cluster.lines[line]


class MemoryNotifier:
    """Wake-ups over the lines; who has none hears nothing."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._cluster = wire, wire.cluster

    async def notify(self, payloads: Sequence[tuple[NodeId | None, str]]) -> None:
        await self._wire.ask("notify", lambda: self._notify(payloads))

    def _notify(self, payloads: Sequence[tuple[NodeId | None, str]]) -> None:
        for node, payload in payloads:
            for hearer, line in list(self._cluster.channels.items()):
                if node in {None, hearer} and line in self._cluster.lines:
                    self._cluster.lines[line](payload)
