"""What the cluster and the sessions need from the store, with the guarantees at each method.

Every method has a deadline of its own and raises ``DatabaseUnavailable`` when it passes. Every write may be repeated
after a lost reply without effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from pgmcp.inheritance import Inheritance
from pgmcp.types import (
    Accepted,
    Attachment,
    Candidate,
    Claimed,
    Condemned,
    Cursor,
    Entry,
    Established,
    Horizon,
    JournalEntry,
    Message,
    NewSession,
    NodeId,
    NodeState,
    Ownership,
    Page,
    Principal,
    Publication,
    PublicationBatch,
    RequestKey,
    SessionFacts,
    SessionKey,
    Stand,
    StreamId,
)


class Inbox(Protocol):
    """Client messages on their way to the owner.

    Taking a message is use of its session, and noted with it.
    """

    async def open_session(self, new: NewSession) -> Ownership:
        """Create the session with this node as its first owner; committed when it returns (G2).

        Raises:
            ClusterFull: too many sessions in all.
            TooManySessions: too many of this caller.
        """
        ...

    async def make_room(self, principal: Principal, address: str | None = None) -> list[SessionKey]:
        """End a session, where there are too many, for a new one of this caller.

        Of a caller with a name, or of an address with anonymous ones, the one that was used longest ago; in a full
        cluster one whose client did not end the handshake within a minute. Never one of which anything runs or is
        carried, nor is accepted meanwhile.

        Returns:
            what was ended, for its owner and its exchanges to be told.

        Raises:
            ClusterFull: there is none in a full cluster.
            TooManySessions: there is none of this caller.
        """
        ...

    async def find(self, session_id: str, principal: Principal, transport: str = "streamable") -> SessionFacts:
        """Look a live session up; one of another transport is unknown.

        Raises:
            SessionUnknown: unknown, over, or somebody else's: the caller cannot tell which (G7).
        """
        ...

    async def accept(self, messages: Sequence[Message]) -> Accepted:
        """Commit the messages of one POST, all or none, ordered with every change of owner and with the end (G2).

        The same POST once more joins the first, until its answers were written to the end; nothing of it is stored.

        Raises:
            SessionUnknown: as in ``find``.
            DuplicateRequest: an id is in use by an unfinished request, or the same one whose answer nobody has got, of
                another POST.
            SessionBusy: the session has too much in flight.
        """
        ...

    async def claim(self, ownership: Ownership, *, requests: bool = True) -> list[Claimed]:
        """Take every unclaimed message of the session, in inbox order (G5).

        Args:
            requests: False leaves requests unclaimed, for another owner to start.

        Raises:
            Fenced: the ownership is over.
        """
        ...

    async def unclaimed(self) -> list[Ownership]:
        """The sessions of this node in which messages wait for a claim."""
        ...

    async def claimed(self) -> dict[Ownership, dict[RequestKey, UUID | None]]:
        """This node's requests that were claimed some time ago and are not finished, each with its claim."""
        ...

    async def put_back(self, ownership: Ownership, claims: Mapping[RequestKey, UUID | None]) -> None:
        """Give up claims of requests that were not started: they wait again. A newer claim stays.

        Raises:
            Fenced: the ownership is over.
        """
        ...

    async def owned(self) -> set[Ownership]:
        """Every live session of this node."""
        ...

    async def owners(self, sessions: Sequence[SessionKey]) -> dict[SessionKey, tuple[NodeId, int]]:
        """Owner and epoch of sessions, of any numbers; those that are over, or never were, are missing."""
        ...

    async def establish(self, ownership: Ownership, facts: Established, version: int) -> None:
        """Record what the handshake settled.

        Args:
            version: as in ``write_journal``.

        Raises:
            Fenced: the ownership is over.
            OutOfStep: as in ``write_journal``.
        """
        ...

    async def write_journal(self, ownership: Ownership, entry: JournalEntry, version: int) -> None:
        """Record or forget one state-establishing message.

        Args:
            version: the number of this write among those of its session. The owner makes one after the other, each
                with a greater number; a try that arrives after a later write changes nothing.

        Raises:
            Fenced: the ownership is over.
            OutOfStep: the session has a write with a greater number.
        """
        ...

    async def unfinished(self, sessions: Sequence[SessionKey]) -> dict[SessionKey, set[RequestKey]]:
        """The requests of sessions that are not finished."""
        ...

    async def keep_claims(self, ownerships: Sequence[Ownership], keys: Sequence[RequestKey]) -> None:
        """In a term that has just begun: claim these requests of these sessions anew; the others wait again."""
        ...

    async def end(self, session_id: str, principal: Principal) -> SessionKey:
        """End the session for its client: every row of it is gone when this returns.

        Raises:
            SessionUnknown: as in ``find``.
        """
        ...

    async def end_owned(self, ownership: Ownership) -> None:
        """End the session for its owner.

        Raises:
            Fenced: the ownership is over, or this node was declared dead: then the session goes on elsewhere.
        """
        ...


class Log(Protocol):
    """What clients are sent, stored before it is said.

    A session is in use while a request of it is unfinished or a stream carried: what ends that notes it, and so does
    ``attach``.
    """

    async def append(self, entry: Entry) -> NodeId | None:
        """Store one event under the owner's fence (G1); the node that carries the stream now, if any.

        Events of a session are stored in the order in which they were given. This waits until the database takes or
        refuses the event, however long that is, and the event is stored also when its caller has gone meanwhile.

        Raises:
            Fenced: the ownership is over.
            OutOfStep: the stream is closed or gone or stands at another number, or the request is not to be finished.
        """
        ...

    async def read(self, cursor: Cursor) -> Page:
        """What follows the cursor, while this node is still the stream's sink and nothing of it was pruned (G3).

        Of an event with more than ``PAGE_BYTES`` it has the first of them: see ``read_on``.
        """
        ...

    async def read_on(self, cursor: Cursor, start: int) -> bytes | None:
        """The next bytes of the event right after the cursor, ``PAGE_BYTES`` at most.

        None when this node is not the stream's sink any more, or the event is gone.

        Args:
            start: how many of them are known.
        """
        ...

    async def attach(
        self, session_id: str | None, principal: Principal, stream: StreamId | None
    ) -> Attachment | SessionFacts:
        """Become the sink of a stream, in the place of the one that has it now; only the facts when there is none such.

        Args:
            session_id: None for the session of the stream, whichever it is.
            stream: None for the session's standalone one.

        Raises:
            SessionUnknown: as in ``Inbox.find``.
            SessionBusy: the session has too many streams open.
            StreamTaken: sinks on living nodes have replaced each other ``REPLACEMENTS`` times within
                ``REPLACED_WITHIN`` seconds, and this is one more (standalone streams only).
        """
        ...

    async def release(self, cursor: Cursor, *, keep: bool = False) -> bool:
        """Note how far the stream was carried and, unless it is kept, stop being its sink.

        Returns:
            whether it was still the sink; if not, nothing was noted.
        """
        ...

    async def carried(self) -> set[tuple[StreamId, int]]:
        """The streams whose sink this node is, each with the epoch of that.

        Raises:
            DatabaseUnavailable: not now.
        """
        ...

    async def drop_sink(self, ownership: Ownership, stream: StreamId | None) -> tuple[StreamId, NodeId | None] | None:
        """Take the stream from its sink without closing it; the stream and the sink that lost it."""
        ...

    async def stands(self, streams: Sequence[StreamId]) -> dict[StreamId, Stand]:
        """Where streams stand; those that are not there are missing."""
        ...

    async def knows(self, stream: StreamId) -> bool:
        """Whether there is such a stream."""
        ...


class Takeovers(Protocol):
    """Deaths, and changes of owner after them."""

    async def condemn(self, *, by_lease: bool, by_silence: bool) -> list[Condemned]:
        """Declare nodes dead, in database time and for good; none unless this node has renewed just now, in that time.

        Args:
            by_lease: those whose lease ran out.
            by_silence: those that have not renewed for a while and whose line has no backend any more.
        """
        ...

    async def take(self, session: SessionKey) -> SessionFacts | None:
        """Become the owner of a session whose owner is dead or left; who owns it now, None when it is over.

        The change of owner locks the session's row, so that no write of the former owner follows it (G1). A node that
        is not ready takes nothing, and whoever comes second sees the state from before: then the session is still
        ``orphaned`` in the answer.
        """
        ...

    async def take_orphans(self, most: int) -> list[Ownership]:
        """Become the owner of sessions that have none alive and that somebody waits for; locked ones are skipped."""
        ...

    async def ready_nodes(self) -> list[Candidate]:
        """The other nodes that may be given sessions now."""
        ...

    async def hand_over(self, ownership: Ownership, to: NodeId) -> Ownership | None:
        """Give a session to another node, which owns it when this returns.

        None, and nothing is changed, when that node is not ready or the ownership is over. Ordered with everything
        else that is written of the session, as ``take``.
        """
        ...

    async def inherit(self, ownership: Ownership) -> Inheritance:
        """Count an attempt to restore the session, then read what its earlier owners left.

        Raises:
            Fenced: the ownership is over.
        """
        ...

    async def adopt(self, ownership: Ownership, runs: Sequence[tuple[RequestKey, int]]) -> None:
        """Claim inherited requests, each with the number of its runs: the one that comes is counted before it is made.

        Raises:
            Fenced: the ownership is over.
        """
        ...

    async def restored(self, ownership: Ownership, left: Inheritance) -> None:
        """Note that the session was restored from what was left, and forget what was exported for that."""
        ...


class Publications(Protocol):
    """What has changed, from whoever says so to every node."""

    async def publish(self, publication: Publication) -> None:
        """Store a publication for every node to read; committed when it returns.

        One that says the same and still waits to be sent may serve both.

        Raises:
            PublicationRefused: it cannot be stored.
        """
        ...

    async def read(self, since: Horizon | None) -> PublicationBatch:
        """What was committed since a horizon; whoever goes on from each answer's horizon gets each publication once.

        That holds in whatever order they commit, for as long as they are kept: some minutes, the newest change of each
        list for ever.

        Args:
            since: None for whatever is kept.
        """
        ...


class LeaseTable(Protocol):
    """The node's own row, written on the line or, while that is down, on the pool."""

    async def renew(self) -> float | None:
        """Prolong the lease.

        Returns:
            the database's time in seconds; None when the row is not live any more: this node was declared dead.
        """
        ...

    async def set_state(self, state: NodeState) -> bool:
        """Change the node's state; False when the row is not live any more."""
        ...


class Notifier(Protocol):
    """Carries wake-ups to other nodes. Losing one delays, and never loses, a message."""

    async def notify(self, payloads: Sequence[tuple[NodeId | None, str]]) -> None:
        """Send each payload to its node (None: to every node)."""
        ...
