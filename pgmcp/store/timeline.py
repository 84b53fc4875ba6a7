"""Which timeline of the database this node follows, and what happens when that becomes another one.

A timeline is what commits have made of the database, one upon the other; PostgreSQL counts those that promotions and
restores begin. The table ``history`` names the one that the other tables' numbers belong to.

When a standby is promoted, or a backup restored, commits may be missing that the former primary had confirmed. Numbers
that were given out in them must never be given out again for something else. So each timeline begins a *term*: before
anything else is done in it, all epochs and event numbers jump. The term is announced in one row, the sessions move to
it piece by piece, and then it begins; anybody goes on where another one stopped: no single deadline must cover it all.

A server that has lost its last commits in a crash (fsync off, a lying disk), or was put back to a snapshot of its
storage, counts no other timeline. It is told by the node's own row: one that is older than the node's last good renewal
has lost that one, and everything after it. Each renewal is durable before it counts (``store.connection.settings``).

Invariants:
- Every connection of a node is checked before it is used: no statement of a node runs in a timeline before its term was
  begun. Only a pooler can put another server behind a connection that is open (docs/guarantees.md).
- A node that has seen a timeline goes back to no older one: a former primary that comes back is refused.
- Connections to a server of another timeline are ended at once, and no statement that was begun before a change of the
  timeline runs after it.

Failure handling: a role that may not read the timeline's mark gets no protection, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID
from weakref import WeakKeyDictionary

import asyncpg

from pgmcp.clock import Ids
from pgmcp.store.connection.error_text import error_text
from pgmcp.store.schema.rights import lacking
from pgmcp.store.statements import statement

logger = logging.getLogger(__name__)

PIECE = 500
"""Sessions that move to a term in one statement; fewer after one did not get through."""

_NO_TABLES = (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError)
_NOT_ALLOWED = (asyncpg.InsufficientPrivilegeError, asyncpg.FeatureNotSupportedError, asyncpg.UndefinedFunctionError)


@dataclass(frozen=True, slots=True)
class _Found:
    id: UUID
    term: int
    mark: str
    present: str
    renewed_at: float
    """The node's last renewal, as its row has it; infinite when somebody has removed that row."""
    next: tuple[UUID, int] | None
    """The term that is announced for the present timeline, and has not begun."""


@dataclass(frozen=True, slots=True)
class _Renewed:
    """A renewal that was confirmed: in which timeline, of which node, and when by the database's clock."""

    timeline: UUID | None
    node: UUID
    at: float


class Timeline:
    """The timeline that a node's connections follow.

    Args:
        schema: the schema of pgmcp's tables.
        ids: names terms.
    """

    def __init__(self, schema: str, ids: Ids) -> None:
        self._schema, self._ids = schema, ids
        self._known: _Found | None = None
        self._open: WeakKeyDictionary[asyncpg.Connection, UUID] = WeakKeyDictionary()
        self._warned = False
        self._piece = PIECE
        self._renewed: _Renewed | None = None
        self.on_change: Callable[[], None] = _nothing
        """Called when the term has become another one."""

    @property
    def known(self) -> UUID | None:
        """The present timeline; None before the first connection."""
        return None if self._known is None else self._known.id

    @property
    def term(self) -> int:
        """The present term."""
        return 0 if self._known is None else self._known.term

    def renewed(self, known: UUID | None, node: UUID, at: float) -> None:
        """Note a renewal of this node's row that was confirmed in the timeline ``known``, and its database time."""
        self._renewed = _Renewed(known, node, at)

    async def follow(self, connection: asyncpg.Connection) -> None:
        """Check a new connection before it is used, and begin the term of its server's timeline if nobody has.

        Raises:
            ConnectionError: the server takes no writes, or follows a timeline that is over.
            Exception: whatever asyncpg raises.
        """
        while True:
            renewed = self._renewed
            found = await self._look(connection, renewed)
            if found is None:
                return
            if self._over(found):
                message = "it follows a timeline that is over: it was the primary before another one was promoted"
                raise ConnectionError(message)
            lost = _lost(found, renewed)
            if found.mark == found.present and not self._forked(found) and not lost:
                break
            await self._begin(connection, found, lost=lost)
        self._note(found)
        self._open[connection] = found.id

    async def _look(self, connection: asyncpg.Connection, renewed: _Renewed | None) -> _Found | None:
        asked = (renewed.node, renewed.at) if renewed is not None else (None, None)
        try:
            row = await connection.fetchrow(statement("history", self._schema), *asked)
        except _NO_TABLES:
            return None  # whoever needs them says so
        except _NOT_ALLOWED as error:
            # Who may not use the tables either is told by whoever needs those.
            if not self._warned and await lacking(connection, self._schema) is None:
                self._warned = True
                logger.warning("a failover that loses commits will not be noticed: %s", error_text(error))
            return None
        if row is None:
            return None
        if row["standby"]:
            message = "it is a standby, which takes no writes"
            raise ConnectionError(message)
        announced = row["next_mark"] == row["present"] and row["next_term"] > row["term"]
        following = (row["next_id"], row["next_term"]) if announced else None
        return _Found(row["id"], row["term"], row["mark"], row["present"], row["renewed_at"], following)

    def _over(self, found: _Found) -> bool:
        if self._known is None:
            return False
        (system, timeline), (known, reached) = found.present.split("/"), self._known.present.split("/")
        return system == known and int(timeline, 16) < int(reached, 16)

    def _forked(self, found: _Found) -> bool:
        """Whether this is a timeline that never heard of the one that this node knows, and counts as far as that."""
        return self._known is not None and found.id != self._known.id and found.term <= self._known.term

    async def _begin(self, connection: asyncpg.Connection, found: _Found, *, lost: bool) -> None:
        if not found.mark and not self._forked(found) and not lost:
            await connection.execute(statement("begin_history", self._schema), found.id, found.present)
            return
        if found.next is None:
            term = max(found.term, self.term) + 1
            given = (found.id, self._ids.uuid(), term, found.present)
            if await connection.fetch(statement("announce_term", self._schema), *given):
                why = "has lost its last commits" if lost else "follows another timeline since its primary changed"
                logger.warning("the database %s: term %d begins", why, term)
            return
        following, term = found.next
        first = True
        while await self._move(connection, following, first=first) >= self._piece:
            first = False
        if await connection.fetch(statement("begin_term", self._schema), found.id, following):
            logger.info("all sessions have moved to term %d", term)

    async def _move(self, connection: asyncpg.Connection, following: UUID, *, first: bool) -> int:
        """Move one piece of the sessions to an announced term; how many that were."""
        try:
            looked: int = await connection.fetchval(statement("move_to_term", self._schema), following, self._piece)
        except BaseException:  # the connection's deadline, most likely: not even one piece fits into it
            if first:
                self._piece = max(1, self._piece // 2)
            raise
        return looked

    def _note(self, found: _Found) -> None:
        before, self._known, self._piece = self._known, found, PIECE
        if before is None or before.id == found.id:
            return
        for connection, term in list(self._open.items()):
            if term != found.id:
                connection.terminate()
        self.on_change()


def _lost(found: _Found, renewed: _Renewed | None) -> bool:
    """Whether a timeline lacks a renewal that was confirmed in it, and nobody has begun a term for that yet."""
    if renewed is None or renewed.timeline != found.id:
        return False
    return found.renewed_at < renewed.at


def _nothing() -> None:
    return None
