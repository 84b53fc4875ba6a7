"""The inbox: client messages are accepted at an edge and claimed by the owner.

Invariants:
- Accepting locks the session's row ``FOR KEY SHARE``: it is ordered with takeover, hand-over and DELETE, and the owner
  that it returns is the one that holds after it.
- Messages of one POST are stored all or none. A POST that is there already is joined (see ``repeats``).
- A request starts only after a committed claim under the owner's fence; a claim takes all that waits, in order.

Failure handling: every statement finds its own rows when it is repeated, because the caller chose their ids.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from uuid import UUID

import asyncpg

from pgmcp.clock import Clock, Ids
from pgmcp.errors import Fenced, OutOfStep, PgmcpError, SessionBusy, SessionUnknown
from pgmcp.store.database import Database, extra
from pgmcp.store.encryption.payloads import CLEAR, Payloads, Stored, place_of_body, place_of_entry
from pgmcp.store.group_commit import GroupCommit
from pgmcp.store.repeats import Fate, fate
from pgmcp.store.rows import claimed_of, facts_of, known_of
from pgmcp.store.scan_floors import ScanFloor, ScanFloors
from pgmcp.store.session_opening import SessionOpening
from pgmcp.store.statements import LockWait
from pgmcp.types import (
    Accepted,
    Claimed,
    Established,
    JournalEntry,
    Message,
    NewSession,
    NodeId,
    Ownership,
    Principal,
    RequestKey,
    SessionFacts,
    SessionKey,
)

WRITTEN_WAIT_SECONDS = 1.0
"""Seconds for which a reused request id waits until the edge that carries its last answer has noted the end."""


HEARD_SECONDS = 10.0
"""Seconds after which the reply to a claim was heard, or never will be."""


WAITING_SHARE = 10
"""Messages of any kind that may wait in a session, as a multiple of its requests in flight."""


@dataclass(eq=False, slots=True)
class _Claim:
    ownership: Ownership
    id: UUID
    requests: bool = True
    sent: bool = False


class TableInbox:
    """The ``Inbox`` port on PostgreSQL, for one node.

    Args:
        database: the node's pool.
        node: who claims and whose edge carries the streams that accepting opens.
        gate: awaited before each write of an owner; waits for trust, raises ``Fenced``.
        payloads: seals and opens what is stored.
    """

    def __init__(
        self,
        database: Database,
        node: NodeId,
        clock: Clock,
        ids: Ids,
        gate: Callable[[], Awaitable[None]],
        payloads: Payloads = CLEAR,
    ) -> None:
        self._database, self._node, self._clock, self._ids, self._gate = database, node, clock, ids, gate
        self._settings = database.settings
        self._hold, self._payloads = database.settings.hold, payloads
        self._session_opening = SessionOpening(database, node)
        self._unheard: dict[Ownership, list[_Claim]] = {}
        self._counted: ScanFloors[tuple[int, str]] = ScanFloors()
        self._taken: ScanFloors[Ownership] = ScanFloors()
        self._seen: ScanFloors[int] = ScanFloors()
        self._waiting = frozenset[UUID]()
        self._accepts: GroupCommit[Sequence[Stored], list[asyncpg.Record]] = GroupCommit(
            self._send_accepts, clock, lambda post: post[0].message.session_id
        )
        self._claims: GroupCommit[_Claim, list[Claimed]] = GroupCommit(
            self._send_claims, clock, lambda claim: claim.ownership.session, gate
        )

    @property
    def unheard(self) -> int:
        """Claims whose replies never came, for the next claims to ask for."""
        return sum(len(claims) for claims in self._unheard.values())

    @property
    def accepting(self) -> bool:
        """Whether POSTs wait to be stored, or are being stored."""
        return self._accepts.busy

    async def open_session(self, new: NewSession) -> Ownership:
        """See ``Inbox.open_session``."""
        return await self._session_opening.open(new)

    async def make_room(self, principal: Principal, address: str | None = None) -> list[SessionKey]:
        """See ``Inbox.make_room``."""
        return await self._session_opening.make_room(principal, address)

    async def find(self, session_id: str, principal: Principal, transport: str = "streamable") -> SessionFacts:
        """See ``Inbox.find``."""
        who = (principal.client_id, principal.issuer, principal.subject)
        rows = await self._database.persist("find_session", session_id, *who, transport, patience=self._hold)
        if not rows:
            raise _unknown()
        return facts_of(rows[0], rows[0]["id"])

    async def accept(self, messages: Sequence[Message]) -> Accepted:
        """See ``Inbox.accept``."""
        size = sum(len(message.body) + len(message.context) for message in messages)
        end = self._clock.boottime() + WRITTEN_WAIT_SECONDS
        while True:
            rows = await self._looked(messages, size)
            if rows[0]["session"] is None:
                raise _unknown()
            if all(row["accepted"] for row in rows):
                return Accepted(facts_of(rows[0], rows[0]["session"]), messages[0].stream, joined=False)
            known = [known_of(row) for row in rows if row["known_id"] is not None]
            if not known and any(row["full"] for row in rows):
                limit = self._settings.max_in_flight
                message = f"This session has {limit} requests in flight; wait for answers before you send more."
                raise SessionBusy(message)
            if not known:
                continue  # another edge is accepting the same request: the next look sees its row
            match fate(known, patient=self._clock.boottime() < end):
                case Fate.JOIN:
                    return Accepted(facts_of(rows[0], rows[0]["session"]), known[0].stream, joined=True)
                case Fate.WAIT:
                    await self._clock.sleep(0.01)
                case Fate.FREE:
                    for each in known:
                        await self._database.persist("free_request_id", each.key, patience=self._hold)

    async def _looked(self, messages: Sequence[Message], size: int) -> list[asyncpg.Record]:
        for _ in range(2):
            stored = [self._payloads.stored(message) for message in messages]
            rows = await self._accepts.put(stored, patience=self._hold + extra(size), size=size)
            if self._payloads.marking or not any(row["sealed"] for row in rows):
                break
            await self._payloads.load()  # somebody began to seal since this node has looked
        return rows

    async def _send_accepts(
        self, posts: Sequence[Sequence[Stored]], lock_wait: LockWait
    ) -> list[list[asyncpg.Record] | PgmcpError]:
        each = [stored for post in posts for stored in post]
        flat = [stored.message for stored in each]
        term = self._database.timeline.term  # another one may count transactions anew
        floors = {message.session_id: self._counted.of((term, message.session_id)) for message in flat}
        rows = await self._database.fetch_sized(
            "accept",
            [message.key for message in flat],
            [message.session_id for message in flat],
            [message.principal.client_id for message in flat],
            [message.principal.issuer for message in flat],
            [message.principal.subject for message in flat],
            [message.rpc_id for message in flat],
            [message.method for message in flat],
            [message.name for message in flat],
            [stored.body for stored in each],
            [message.context for message in flat],
            [message.stream for message in flat],
            self._node,
            self._settings.max_in_flight,
            self._settings.max_in_flight * WAITING_SHARE,
            [number for number, messages in enumerate(posts) for _ in messages],
            [message.transport for message in flat],
            list(floors),
            [floor.low for floor in floors.values()],
            [floor.texts[0] for floor in floors.values()],
            [floor.texts[1] for floor in floors.values()],
            [message.arrived for message in flat],
            [stored.mark for stored in each],
            [stored.digest for stored in each],
            size=max(len(stored.body) for stored in each),
            lock_wait=lock_wait,
        )
        for session_id, row in {m.session_id: r for m, r in zip(flat, rows, strict=True) if r["horizon"]}.items():
            seen = ScanFloor.of(row["horizon"], row["unfinished"] or ())
            self._counted.rise((term, session_id), floors[session_id], seen)
        results: list[list[asyncpg.Record] | PgmcpError] = []
        for messages in posts:
            results.append(rows[: len(messages)])
            rows = rows[len(messages) :]
        return results

    async def claim(self, ownership: Ownership, *, requests: bool = True) -> list[Claimed]:
        """See ``Inbox.claim``."""
        # A claim whose reply never came may have been committed: the next one asks for its rows, by the same id.
        unheard = self._unheard.pop(ownership, [])
        repeated = bool(unheard)
        claim = unheard.pop() if unheard else _Claim(ownership, self._ids.uuid())
        claim.requests = requests
        if unheard:
            self._unheard[ownership] = unheard
        try:
            claimed = await self._claims.put(claim, patience=self._hold)
            if repeated:  # once more: see GroupCommit on first tries that commit beside their repeat
                claimed = await self._claims.put(claim, patience=self._hold)
        except Fenced:
            self._unheard.pop(ownership, None)
            raise
        except BaseException:
            self._unheard.setdefault(ownership, []).append(claim)
            raise
        return claimed

    async def _send_claims(self, claims: Sequence[_Claim], lock_wait: LockWait) -> list[list[Claimed] | PgmcpError]:
        newest = {claim.ownership.session: claim for claim in claims}
        repeat = any(claim.sent for claim in claims)
        for claim in claims:
            claim.sent = True
        floors = {claim.ownership: self._taken.of(claim.ownership) for claim in newest.values()}
        rows = await self._database.fetch(
            "claim",
            [claim.ownership.session for claim in newest.values()],
            [claim.ownership.epoch for claim in newest.values()],
            [claim.id for claim in newest.values()],
            self._node,
            repeat,
            [claim.requests for claim in newest.values()],
            [floor.low for floor in floors.values()],
            [floor.texts[0] for floor in floors.values()],
            self._settings.use_precision,
            lock_wait=lock_wait,
        )
        for row in rows:
            ownership = Ownership(SessionKey(row["session"]), row["epoch"])
            if newest[ownership.session].requests:  # else requests are left where they wait
                self._taken.rise(ownership, floors[ownership], ScanFloor.of(row["horizon"]))
        taken = {
            whose: await self._opened([row for row in group if row["id"] is not None])
            for whose, group in groupby(rows, key=lambda row: (row["session"], row["epoch"]))
        }
        return [
            taken.get((claim.ownership.session, claim.ownership.epoch), over(claim.ownership))
            if newest[claim.ownership.session] is claim
            else []
            for claim in claims
        ]

    async def _opened(self, rows: Sequence[asyncpg.Record]) -> list[Claimed] | PgmcpError:
        try:
            return [claimed_of(row, await self._payloads.open(row["body"], place_of_body(row["id"]))) for row in rows]
        except PgmcpError as error:
            return error  # of this session only

    async def unclaimed(self) -> list[Ownership]:
        """See ``Inbox.unclaimed``."""
        rows = await self._look()
        await self._forget_unheard()
        waiting = {row["id"]: Ownership(SessionKey(row["session"]), row["epoch"]) for row in rows if row["waits"]}
        for key in self._waiting & waiting.keys():  # a claim was made since, most likely, and did not find it
            self._taken.forget(waiting[key])
        self._waiting = frozenset(waiting)
        return list({**self._unheard, **dict.fromkeys(waiting.values())})

    async def _look(self) -> list[asyncpg.Record]:
        """What is unfinished in this node's sessions."""
        term = self._database.timeline.term
        floor = self._seen.of(term)
        rows = await self._database.ask("unclaimed", self._node, floor.low, floor.running, floor.known)
        known = [row["id"] for row in rows if row["id"] is not None]
        self._seen.rise(term, floor, ScanFloor.of(rows[0]["horizon"], known))
        return rows

    def look_anew(self) -> None:
        """PostgreSQL may have crashed: floors name transactions by ids that may have been given out anew."""
        for floors in (self._counted, self._taken, self._seen):
            floors.clear()

    async def _forget_unheard(self) -> None:
        """Forget the claims that gave up of sessions that have ended, or are others' by now."""
        unheard = list(self._unheard)
        if not unheard:
            return
        sessions, epochs = [each.session for each in unheard], [each.epoch for each in unheard]
        rows = await self._database.ask("still_owned", self._node, sessions, epochs)
        held = {Ownership(SessionKey(row["id"]), row["epoch"]) for row in rows}
        for ownership in unheard:
            if ownership not in held:
                self._unheard.pop(ownership, None)

    async def establish(self, ownership: Ownership, facts: Established, version: int) -> None:
        """See ``Inbox.establish``."""
        rows = await self._owner_write(
            "establish",
            ownership,
            facts.protocol_version,
            facts.client_name,
            facts.client_version,
            facts.capabilities,
            version,
        )
        _check_newest(rows, ownership)

    async def write_journal(self, ownership: Ownership, entry: JournalEntry, version: int) -> None:
        """See ``Inbox.write_journal``."""
        body = entry.body
        if body is not None:
            body = self._payloads.seal(body, place_of_entry(ownership.session, entry))
        what = (entry.kind, entry.detail, body, version)
        _check_newest(await self._owner_write("write_journal", ownership, *what), ownership)

    async def _owner_write(self, name: str, ownership: Ownership, *args: object) -> list[asyncpg.Record]:
        fence = (ownership.session, self._node, ownership.epoch)
        return await self._database.persist(name, *fence, *args, patience=self._hold, gate=self._gate)

    async def claimed(self) -> dict[Ownership, dict[RequestKey, UUID | None]]:
        """See ``Inbox.claimed``."""
        known = [row["id"] for row in await self._look() if row["id"] is not None]
        found: dict[Ownership, dict[RequestKey, UUID | None]] = {}
        for row in await self._database.ask("claimed_requests", self._node, HEARD_SECONDS, known):
            ownership = Ownership(SessionKey(row["session"]), row["epoch"])
            found.setdefault(ownership, {})[RequestKey(row["id"])] = row["claim"]
        return found

    async def put_back(self, ownership: Ownership, claims: Mapping[RequestKey, UUID | None]) -> None:
        """See ``Inbox.put_back``."""
        if not await self._owner_write("put_back", ownership, list(claims), list(claims.values())):
            raise over(ownership)
        self._taken.forget(ownership)

    async def owned(self) -> set[Ownership]:
        """See ``Inbox.owned``."""
        rows = await self._database.ask("owned", self._node)
        return {Ownership(SessionKey(row["id"]), row["epoch"]) for row in rows}

    async def owners(self, sessions: Sequence[SessionKey]) -> dict[SessionKey, tuple[NodeId, int]]:
        """See ``Inbox.owners``."""
        rows = await self._database.ask("owners", list(sessions))
        return {SessionKey(row["id"]): (NodeId(row["owner"]), row["epoch"]) for row in rows}

    async def unfinished(self, sessions: Sequence[SessionKey]) -> dict[SessionKey, set[RequestKey]]:
        """See ``Inbox.unfinished``."""
        found: dict[SessionKey, set[RequestKey]] = {}
        for row in await self._database.persist("unfinished", list(sessions), patience=self._hold):
            found.setdefault(SessionKey(row["session"]), set()).add(RequestKey(row["id"]))
        return found

    async def keep_claims(self, ownerships: Sequence[Ownership], keys: Sequence[RequestKey]) -> None:
        """See ``Inbox.keep_claims``."""
        ordered = sorted(ownerships, key=lambda ownership: ownership.session)
        sessions, epochs = [each.session for each in ordered], [each.epoch for each in ordered]
        await self._database.persist("keep_claims", sessions, epochs, self._node, list(keys), patience=self._hold)
        self._unheard.clear()  # claims of the former term are void

    async def end(self, session_id: str, principal: Principal) -> SessionKey:
        """See ``Inbox.end``."""
        facts = await self.find(session_id, principal)  # first, so that a repeat after a lost reply is no "unknown"
        await self._database.persist("end_session", facts.session, patience=self._hold)
        return facts.session

    async def end_owned(self, ownership: Ownership) -> None:
        """See ``Inbox.end_owned``."""
        rows = await self._owner_write("end_owned_session", ownership)
        if rows[0]["elsewhere"]:
            raise over(ownership)


def _unknown() -> SessionUnknown:
    return SessionUnknown("Session not found")


def _check_newest(rows: Sequence[asyncpg.Record], ownership: Ownership) -> None:
    if not rows:
        raise over(ownership)
    if not rows[0]["newest"]:
        message = "The session's journal has a newer entry than this; nothing was stored."
        raise OutOfStep(message)


def over(ownership: Ownership) -> Fenced:
    """The error for an ownership that is over."""
    return Fenced(f"This node does not own the session in epoch {ownership.epoch} any more.")
