"""The ``Inbox`` port in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from uuid import UUID

from pgmcp.clock import Ids
from pgmcp.errors import (
    ClusterFull,
    Fenced,
    OutOfStep,
    PgmcpError,
    SessionBusy,
    SessionUnknown,
    TooManySessions,
)
from pgmcp.store.repeats import Fate, Known, fate
from pgmcp.types import (
    ANONYMOUS,
    JUMP,
    Accepted,
    Claimed,
    Established,
    JournalEntry,
    Message,
    NewSession,
    NodeId,
    Outcome,
    Ownership,
    Principal,
    RequestKey,
    SessionFacts,
    SessionKey,
    StreamKind,
)
from tests.harness.memory.tables import RequestRow, SessionRow, StreamRow
from tests.harness.memory.wire import Wire

WRITTEN_WAIT, WAITING_SHARE, CLIENT_GONE = 1.0, 10, 60.0


@dataclass(slots=True)
class _Verdict:
    """What the accept statement says of a POST."""

    facts: SessionFacts | None = None
    accepted: bool = False
    full: bool = False
    known: list[Known] = field(default_factory=list)


class MemoryInbox:
    """One node's inbox."""

    def __init__(self, wire: Wire, ids: Ids) -> None:
        self._wire, self._ids = wire, ids
        self._cluster, self._node = wire.cluster, wire.node
        self._unheard: dict[Ownership, list[UUID]] = {}

    async def open_session(self, new: NewSession) -> Ownership:
        return await self._wire.persist("open_session", lambda: self._open(new))

    def _open(self, new: NewSession) -> Ownership:
        found = self._cluster.session_called(new.session_id)
        if found is not None:
            return found.ownership
        if new.session_id in self._cluster.ended:
            message = "It has ended already."
            raise SessionUnknown(message)
        settings, rows = self._cluster.settings, self._cluster.sessions.values()
        if len(rows) >= settings.max_sessions:
            raise ClusterFull
        if len(self._own(new.principal, new.address)) >= settings.max_sessions_per_caller:
            raise TooManySessions
        row = SessionRow(SessionKey(self._cluster.number()), new.session_id, self._node, new.principal, new.transport)
        row.epoch += self._cluster.term * JUMP  # each term has epochs of its own: keys may come up again
        row.address = new.address
        row.created_at = self._cluster.now()
        self._cluster.sessions[row.id] = row
        self._cluster.streams[new.standalone] = StreamRow(new.standalone, row.id, StreamKind.STANDALONE)
        self._cluster.owned(self._node, row.ownership)
        return row.ownership

    def _own(self, principal: Principal, address: str | None) -> list[SessionRow]:
        if principal.client_id is None and not address:
            return []
        rows = [row for row in self._cluster.sessions.values() if row.principal == principal]
        return [row for row in rows if principal.client_id is not None or row.address == address]

    async def make_room(self, principal: Principal, address: str | None = None) -> list[SessionKey]:
        return await self._wire.persist("make_room", lambda: self._make_room(principal, address))

    def _make_room(self, principal: Principal, address: str | None) -> list[SessionKey]:
        settings, rows = self._cluster.settings, list(self._cluster.sessions.values())
        unused = [row for row in rows if not self._in_use(row)]
        own = self._own(principal, address)
        if own and len(own) >= settings.max_sessions_per_caller:
            candidates = [row for row in unused if row in own]
            error: PgmcpError = TooManySessions()
        elif len(rows) >= settings.max_sessions:
            late = self._cluster.now() - CLIENT_GONE
            begun = {place[0] for place in self._cluster.journal if place[1] == "initialized"}
            candidates = [row for row in unused if row.id not in begun and self._used_at(row) < late]
            error = ClusterFull()
        else:
            return []
        if not candidates:
            raise error
        ended = min(candidates, key=lambda row: (self._used_at(row), row.id)).id
        self._cluster.forget(ended)
        return [ended]

    def _in_use(self, row: SessionRow) -> bool:
        carried = any(stream.sink is not None for stream in self._cluster.streams_of(row.id))
        return carried or any(not request.finished for request in self._cluster.requests_of(row.id))

    def _used_at(self, row: SessionRow) -> float:
        return max([row.created_at, *(request.accepted_at for request in self._cluster.requests_of(row.id))])

    async def find(self, session_id: str, principal: Principal, transport: str = "streamable") -> SessionFacts:
        row = await self._wire.persist("find_session", lambda: self._visible(session_id, principal, transport))
        return self._cluster.facts(row, orphaned=False)

    def _visible(self, session_id: str, principal: Principal, transport: str) -> SessionRow:
        row = self._cluster.session_called(session_id)
        if row is None or row.principal != principal or row.transport != transport:
            message = "Session not found"
            raise SessionUnknown(message)
        return row

    async def accept(self, messages: Sequence[Message]) -> Accepted:
        end = self._wire.clock.boottime() + WRITTEN_WAIT
        while True:
            verdict = await self._wire.in_turn("accept", messages[0].session_id, lambda: self._accept(messages))
            if verdict.facts is None:
                message = "Session not found"
                raise SessionUnknown(message)
            if verdict.accepted:
                return Accepted(verdict.facts, messages[0].stream, joined=False)
            if not verdict.known:
                raise SessionBusy
            match fate(verdict.known, patient=self._wire.clock.boottime() < end):
                case Fate.JOIN:
                    return Accepted(verdict.facts, verdict.known[0].stream, joined=True)
                case Fate.WAIT:
                    await self._wire.clock.sleep(0.01)
                case Fate.FREE:
                    for each in verdict.known:
                        await self._wire.persist("free_request_id", partial(self._free, each.key))

    def _free(self, key: RequestKey) -> None:
        row = self._cluster.requests.get(key)
        if row is not None and row.finished:
            row.open = False

    def _accept(self, messages: Sequence[Message]) -> _Verdict:
        cluster, first = self._cluster, messages[0]
        try:
            session = self._visible(first.session_id, first.principal, first.transport)
        except SessionUnknown:
            return _Verdict()
        verdict = _Verdict(cluster.facts(session, orphaned=not cluster.lives(session.owner)))
        rows = list(cluster.requests_of(session.id))
        verdict.known = self._known(rows, messages)
        verdict.accepted = all(message.key in cluster.requests for message in messages)
        verdict.full = self._excess(session, rows, messages)
        if verdict.accepted or verdict.known or verdict.full:
            return verdict
        self._store(session, messages)
        verdict.accepted = True
        return verdict

    def _known(self, rows: list[RequestRow], messages: Sequence[Message]) -> list[Known]:
        found: list[Known] = []
        bodies = sorted(message.body for message in messages)
        for message in messages:
            for row in rows:
                if message.rpc_id is None or row.message.rpc_id != message.rpc_id:
                    continue
                if not row.open and not self._held_up(row, rows, message):
                    continue
                stream = row.message.stream
                carried = self._cluster.streams.get(stream) if stream else None
                same = row.message.body == message.body
                post = sorted(other.message.body for other in rows if other.message.stream == stream)
                attached = carried is not None and carried.sink is not None
                whole = same and (stream is None or post == bodies)
                found.append(Known(row.key, stream, same, row.finished, attached, whole))
        return found if len({each.stream for each in found}) < 2 else [replace(each, whole=False) for each in found]

    def _held_up(self, row: RequestRow, rows: list[RequestRow], message: Message) -> bool:
        newest = max(other.position for other in rows if other.message.rpc_id == message.rpc_id)
        came_before = message.arrived is not None and row.finished_at > message.arrived
        return row.position == newest and row.finished and came_before and row.message.body == message.body

    def _excess(self, session: SessionRow, rows: list[RequestRow], messages: Sequence[Message]) -> bool:
        most = self._cluster.settings.max_in_flight
        unfinished = [row for row in rows if not row.finished]
        asked = [message for message in messages if message.rpc_id is not None]
        running = sum(row.message.rpc_id is not None for row in unfinished)
        standalone = self._cluster.standalone_of(session.id)
        unread = (
            standalone.next_seq - 1 - standalone.delivered_seq
            if standalone is not None and standalone.sink is None
            else 0
        )
        return (
            (bool(asked) and running + len(asked) > most)
            or len(unfinished) + len(messages) > most * WAITING_SHARE
            or (any(message.stream is None for message in asked) and unread >= most * WAITING_SHARE)
        )

    def _store(self, session: SessionRow, messages: Sequence[Message]) -> None:
        for message in messages:
            self._cluster.requests[message.key] = RequestRow(
                self._cluster.position(), session.id, message, message.rpc_id is not None, self._cluster.now()
            )
            if message.stream is not None and message.rpc_id is not None:
                stream = self._cluster.streams.setdefault(
                    message.stream, StreamRow(message.stream, session.id, StreamKind.REQUEST, self._node)
                )
                stream.unfinished += 1

    async def claim(self, ownership: Ownership, *, requests: bool = True) -> list[Claimed]:
        unheard = self._unheard.pop(ownership, [])
        claim = unheard.pop() if unheard else self._ids.uuid()
        if unheard:
            self._unheard[ownership] = unheard
        try:
            work = lambda: self._claim(ownership, claim, requests)  # noqa: E731
            return await self._wire.in_turn("claim", ownership, work, gated=True)
        except Fenced:
            self._unheard.pop(ownership, None)
            raise
        except BaseException:
            self._unheard.setdefault(ownership, []).append(claim)
            raise

    def _claim(self, ownership: Ownership, claim: UUID, requests: bool) -> list[Claimed]:
        self._fence(ownership)
        mine = []
        for row in self._cluster.requests_of(ownership.session):
            wanted = requests or row.message.rpc_id is None
            if wanted and row.claimed_epoch is None and not row.finished:
                row.claim, row.claimed_epoch, row.runs = claim, ownership.epoch, row.runs + 1
                if row.message.rpc_id is None:
                    row.outcome = Outcome.DELIVERED
                self._cluster.unflushed.append(row)
                self._cluster.stored(self._node, "claim", ownership)
            if row.claim == claim and (row.message.rpc_id is None or not row.finished):
                mine.append(self._claimed(row, ownership))
        return mine

    def _claimed(self, row: RequestRow, ownership: Ownership) -> Claimed:
        message = row.message
        stream = self._cluster.streams.get(message.stream) if message.stream else None
        return Claimed(
            row.key, ownership, message.rpc_id, message.method, message.body, message.context, message.stream,
            1 if stream is None else stream.next_seq,
        )  # fmt: skip

    def _fence(self, ownership: Ownership) -> SessionRow:
        row = self._cluster.owned_by(self._node, ownership)
        if row is None:
            message = f"Session {ownership.session} has another owner or is over."
            raise Fenced(message)
        return row

    async def unclaimed(self) -> list[Ownership]:
        found = await self._wire.ask("unclaimed", self._unclaimed)
        held = {row.ownership for row in self._cluster.sessions.values() if row.owner == self._node}
        self._unheard = {each: claims for each, claims in self._unheard.items() if each in held}
        return [*self._unheard, *found]

    def _unclaimed(self) -> list[Ownership]:
        return [
            session.ownership
            for session in self._cluster.sessions.values()
            if session.owner == self._node
            and any(
                not row.finished and (row.claimed_epoch is None or row.claimed_epoch < session.epoch)
                for row in self._cluster.requests_of(session.id)
            )
        ]

    async def claimed(self) -> dict[Ownership, dict[RequestKey, UUID | None]]:
        def work() -> dict[Ownership, dict[RequestKey, UUID | None]]:
            return {
                session.ownership: claims
                for session in self._cluster.sessions.values()
                if session.owner == self._node
                and (
                    claims := {
                        row.key: row.claim
                        for row in self._cluster.requests_of(session.id)
                        if row.claimed_epoch == session.epoch and not row.finished
                    }
                )
            }

        return await self._wire.ask("claimed_requests", work)

    async def put_back(self, ownership: Ownership, claims: Mapping[RequestKey, UUID | None]) -> None:
        def work() -> None:
            self._fence(ownership)
            for row in self._cluster.requests_of(ownership.session):
                seen = row.key in claims and row.claim == claims[row.key]
                if seen and row.claimed_epoch == ownership.epoch and not row.finished:
                    row.claim, row.claimed_epoch, row.runs = None, None, max(row.runs - 1, 0)
            self._cluster.stored(self._node, "put_back", ownership)

        await self._wire.persist("put_back", work, gated=True)

    async def owned(self) -> set[Ownership]:
        return await self._wire.ask(
            "owned",
            lambda: {row.ownership for row in self._cluster.sessions.values() if row.owner == self._node},
        )

    async def owners(self, sessions: Sequence[SessionKey]) -> dict[SessionKey, tuple[NodeId, int]]:
        rows = self._cluster.sessions
        return await self._wire.ask(
            "owners", lambda: {key: (rows[key].owner, rows[key].epoch) for key in sessions if key in rows}
        )

    async def establish(self, ownership: Ownership, facts: Established, version: int) -> None:
        def work() -> None:
            self._newest(ownership, version).settled = facts
            self._cluster.stored(self._node, "establish", ownership)

        await self._wire.persist("establish", work, gated=True)

    def _newest(self, ownership: Ownership, version: int) -> SessionRow:
        row = self._fence(ownership)
        if row.version > version:
            message = f"The journal of session {ownership.session} has a newer entry than this; nothing was stored."
            raise OutOfStep(message)
        row.version = version
        return row

    async def write_journal(self, ownership: Ownership, entry: JournalEntry, version: int) -> None:
        def work() -> None:
            self._newest(ownership, version)
            place = (ownership.session, entry.kind, entry.detail)
            self._cluster.journal.pop(place, None)  # what is written anew is the newest
            if entry.body is not None:
                self._cluster.journal[place] = entry.body
            self._cluster.stored(self._node, "write_journal", ownership)

        await self._wire.persist("write_journal", work, gated=True)

    async def unfinished(self, sessions: Sequence[SessionKey]) -> dict[SessionKey, set[RequestKey]]:
        def work() -> dict[SessionKey, set[RequestKey]]:
            found: dict[SessionKey, set[RequestKey]] = {}
            for row in self._cluster.requests.values():
                if row.session in sessions and row.message.rpc_id is not None and not row.finished:
                    found.setdefault(row.session, set()).add(row.key)
            return found

        return await self._wire.persist("unfinished", work)

    async def keep_claims(self, ownerships: Sequence[Ownership], keys: Sequence[RequestKey]) -> None:
        def work() -> None:
            for ownership in ownerships:
                if self._cluster.owned_by(self._node, ownership) is not None:
                    self._keep_claims(ownership, keys)
                    self._cluster.stored(self._node, "keep_claims", ownership)

        await self._wire.persist("keep_claims", work)
        self._unheard.clear()

    def _keep_claims(self, ownership: Ownership, keys: Sequence[RequestKey]) -> None:
        for row in self._cluster.requests_of(ownership.session):
            former = row.claimed_epoch
            if row.message.rpc_id is None or row.finished or (former or 0) >= ownership.epoch:
                continue  # what was claimed in the term already is let be
            row.claim = None
            if row.key in keys:
                row.claimed_epoch, row.runs = ownership.epoch, max(row.runs, 1)
            else:
                row.claimed_epoch, row.runs = None, row.runs if former is None else max(row.runs - 1, 0)

    async def end(self, session_id: str, principal: Principal = ANONYMOUS) -> SessionKey:
        facts = await self.find(session_id, principal)
        await self._wire.persist("end_session", lambda: self._cluster.forget(facts.session))
        return facts.session

    async def end_owned(self, ownership: Ownership) -> None:
        def work() -> None:
            if ownership.session in self._cluster.sessions:
                self._fence(ownership)
                self._cluster.stored(self._node, "end_owned_session", ownership)
                self._cluster.forget(ownership.session)

        await self._wire.persist("end_owned_session", work, gated=True)
