"""The values that travel between the layers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import NewType
from uuid import UUID

VERSION = "0.1.0"
"""This build, as nodes write it into their rows."""

NodeId = NewType("NodeId", UUID)
"""One server process: fresh at each process start."""

SessionKey = NewType("SessionKey", int)
"""A session's internal number; the public session id never leaves edge and tables."""

StreamId = NewType("StreamId", UUID)
"""A stream; whoever knows the one of an HTTP+SSE session can resume it, so it is in no wake-up, view or log (G8)."""

StreamAlias = NewType("StreamAlias", str)
"""What wake-ups call a stream: it leads from a stream to its alias, and never back."""

RequestKey = NewType("RequestKey", UUID)


PAGE, PAGE_BYTES = 64, 1024 * 1024
"""Events that one look at a stream returns at most, and their bytes unless the first alone has more."""


REPLACEMENTS, REPLACED_WITHIN_SECONDS = 3, 10.0
"""How often, within how many seconds, listeners may take a standalone stream from one that a living node carries."""


JUMP = 1_000_000
"""How far numbers jump where those from before may still be on their way: epochs and events at a term, what an owner
writes into a journal at a restore. More than one session or stream ever uses."""


CARRIED = 64
"""Times as many standalone notifications may wait while a client listens: it takes them as fast as they are stored."""


_VERSION_BITS = 0xF << 76
_ALIASES = 8


def node_id(drawn: UUID) -> NodeId:
    """The id of a node of this build: its version says that wake-ups may call streams by their aliases."""
    return NodeId(UUID(int=drawn.int & ~_VERSION_BITS | _ALIASES << 76))


def knows_aliases(node: NodeId) -> bool:
    """Whether a node is of a build that knows streams by their aliases; older ones are told their ids."""
    return node.version == _ALIASES


def session_alias(session_id: str) -> str:
    """What logs, and views of HTTP+SSE (migration 0018), call a session: of the shape of ids, and never leads back."""
    hint = session_id[:-32] if re.search("-[0-9a-f]{32}$", session_id) else ""
    return hint + sha256(session_id.encode()).hexdigest()[:32]


def alias_of(stream: StreamId) -> StreamAlias:
    """What a stream is called where it must not be resumed from."""
    return StreamAlias(sha256(stream.bytes).hexdigest()[:32])


class NodeState(StrEnum):
    """A node's state as its row says it."""

    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    LEFT = "left"
    DEAD = "dead"


class StreamKind(StrEnum):
    """A request's own stream, or the session's standalone one."""

    REQUEST = "request"
    STANDALONE = "standalone"


class Outcome(StrEnum):
    """How an inbox message ended."""

    ANSWERED = "answered"
    CANCELLED = "cancelled"
    DELIVERED = "delivered"
    LOST = "lost"


class Change(StrEnum):
    """What a publication is about."""

    TOOLS = "tools_list_changed"
    PROMPTS = "prompts_list_changed"
    RESOURCES = "resources_list_changed"
    UPDATED = "resource_updated"


PUBLICATIONS_SECONDS = 300.0
"""Seconds for which publications are kept: twice as long as a reader of them may be absent without a gap."""

PUBLISHED = "p"
"""The wake-up that says that there are publications; migration 0004 says the same word."""

LISTS = frozenset({Change.TOOLS, Change.PROMPTS, Change.RESOURCES})


@dataclass(frozen=True, slots=True)
class Publication:
    """Something that has changed, for every client that wants to hear of it; ``uri`` is the updated resource's."""

    change: Change
    uri: str | None = None


Horizon = NewType("Horizon", str)
"""Which publications a reader has seen; only the store can read it."""


@dataclass(frozen=True, slots=True)
class PublicationBatch:
    """Publications, and the horizon behind them; ``more`` says that there were too many to list them all."""

    horizon: Horizon
    publications: tuple[Publication, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a session belongs to; all None for a server without authentication."""

    client_id: str | None = None
    issuer: str | None = None
    subject: str | None = None


ANONYMOUS = Principal()


@dataclass(frozen=True, slots=True)
class Ownership:
    """The right to run a session's actor; every write of the owner carries it."""

    session: SessionKey
    epoch: int


@dataclass(frozen=True, slots=True)
class NewSession:
    """A session that its first owner is about to create; ``address`` tells callers apart that have no name."""

    session_id: str
    principal: Principal
    transport: str
    standalone: StreamId
    address: str | None = None


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What an edge needs to know of a session; ``orphaned`` says that its owner is dead, left or removed.

    ``owner_name`` is the owner's label, where the statement read it.
    """

    session: SessionKey
    owner: NodeId
    epoch: int
    protocol_version: str | None
    orphaned: bool = False
    owner_name: str | None = None

    @property
    def living_owner(self) -> str | None:
        """The owner's label, unless it is known to be gone or was not read."""
        return None if self.orphaned else self.owner_name


@dataclass(frozen=True, slots=True)
class Message:
    """One client message on its way into the inbox.

    ``rpc_id`` is the JSON text of the request's id, so that ``1`` and ``"1"`` stay apart;
    None for notifications and responses. ``context`` is sealed (see ``SecretBox``). ``arrived`` is when its POST came,
    in the database's time (seconds since 1970) and never earlier than it was; None if that is not known.
    """

    key: RequestKey
    session_id: str
    principal: Principal
    rpc_id: str | None
    method: str | None
    name: str | None
    body: bytes
    context: bytes
    stream: StreamId | None
    transport: str = "streamable"
    arrived: float | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The inbox holds the message; ``stream`` is the one that carries its answer.

    ``joined`` says that the same request was already there: its stream, not a new one.
    """

    facts: SessionFacts
    stream: StreamId | None
    joined: bool


@dataclass(frozen=True, slots=True)
class Claimed:
    """One message that its owner has claimed, in inbox order."""

    key: RequestKey
    ownership: Ownership
    rpc_id: str | None
    method: str | None
    body: bytes
    context: bytes
    stream: StreamId | None
    next_seq: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One event that an owner appends to a stream.

    With ``finishes`` it is that request's answer; with ``topic`` it may give way to a newer one while it waits.
    """

    ownership: Ownership
    stream: StreamId
    seq: int
    message: bytes
    finishes: RequestKey | None = None
    outcome: Outcome | None = None
    topic: str | None = None


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a stream stands: the number of its next event, and whether there will be one."""

    next_seq: int
    closed: bool

    def before(self, jump: int) -> int:
        """Where it stood before a term began; closed streams do not jump."""
        return self.next_seq if self.closed else self.next_seq - jump


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far one edge has carried a stream.

    What is missing up to ``floor`` is no gap: the client asked for what waits, whatever that is.
    """

    stream: StreamId
    sink_epoch: int
    after: int
    floor: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One message of a stream; of a large one the first bytes, and how many there are besides (``Log.read_on``)."""

    seq: int
    message: bytes
    rest: int = 0

    @property
    def size(self) -> int:
        """The message's bytes."""
        return len(self.message) + self.rest


@dataclass(frozen=True, slots=True)
class Page:
    """What a stream holds after a cursor.

    ``attached`` is False when another edge carries the stream now, or some of what follows the cursor is gone;
    ``closed`` says that nothing will follow these events, ``more`` that another look finds others at once.
    """

    attached: bool
    closed: bool
    events: tuple[Event, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class Attachment:
    """A stream that this edge has taken over as its sink."""

    facts: SessionFacts
    session_id: str
    stream: StreamId
    kind: StreamKind
    sink_epoch: int
    next_seq: int
    delivered_seq: int
    floor_seq: int
    closed: bool
    replaced: NodeId | None

    @classmethod
    def to_new(cls, facts: SessionFacts, session_id: str, stream: StreamId) -> Attachment:
        """To the stream of a request, which begins when that is accepted."""
        return cls(
            facts=facts,
            session_id=session_id,
            stream=stream,
            kind=StreamKind.REQUEST,
            sink_epoch=1,
            next_seq=1,
            delivered_seq=0,
            floor_seq=0,
            closed=False,
            replaced=None,
        )


@dataclass(frozen=True, slots=True)
class Established:
    """What a session's handshake settled; written once, before the client is told."""

    protocol_version: str
    client_name: str
    client_version: str
    capabilities: bytes


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One state-establishing message; ``body`` None removes the entry."""

    kind: str
    detail: str = ""
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What a node writes of itself when it joins; ``serves`` names what all nodes of its cluster serve."""

    node_id: NodeId
    name: str
    address: str
    version: str
    schema_revision: str
    serves: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be given sessions, its build, and how many it owns."""

    node: NodeId
    version: str
    sessions: int


@dataclass(frozen=True, slots=True)
class Condemned:
    """A node that was declared dead, and whether its lease ran out or it was silent and its line gone."""

    node: NodeId
    name: str
    cause: str


@dataclass(frozen=True, slots=True)
class Wake:
    """One wake-up for one node: ids only, meaning "look at the tables"."""

    inboxes: frozenset[SessionKey] = field(default_factory=frozenset)
    streams: frozenset[StreamAlias] = field(default_factory=frozenset)
    ended: frozenset[SessionKey] = field(default_factory=frozenset)
    handed: frozenset[Ownership] = field(default_factory=frozenset)
    orphans: bool = False
    published: bool = False
    everything: bool = False
    junk: int = 0
    """Words that say nothing to this build."""
