"""Publications: what has changed, stored once for all nodes.

Invariants:
- A publication is committed when ``publish`` returns.
- A reader's horizon is a snapshot of PostgreSQL: what is visible now and was not in it is new, in whatever order
  transactions commit. So nothing is passed over, and nothing is read twice.
- What waits to be sent counts once. What is being sent does not count any more: it may be read before the next change.

Failure handling: the publisher chose the ids, so a repeated statement finds its rows. At most ``WAITING`` publications
wait for the database, each for ``hold`` seconds; then their publishers are told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import asyncpg

from pgmcp.clock import Clock, Ids
from pgmcp.errors import DatabaseUnavailable, PgmcpError, PublicationRefused
from pgmcp.settings import Settings
from pgmcp.store.connection.encoding import encoding_of
from pgmcp.store.connection.one_shot import connect, explained
from pgmcp.store.database import Database
from pgmcp.store.group_commit import GroupCommit
from pgmcp.store.notifier import channel
from pgmcp.store.statements import LockWait, statement
from pgmcp.types import PUBLISHED, Change, Horizon, Publication, PublicationBatch

MOST = 1_000
"""Publications that one look lists at most."""

WAITING = 4_096
"""Publications that may wait for the database on one node."""

LONGEST_URI_BYTES = 8_192
"""Bytes that a resource's uri may have."""


@dataclass(eq=False, slots=True)
class _Draft:
    id: UUID
    publication: Publication


class TablePublications:
    """The ``Publications`` port on PostgreSQL, for one node."""

    def __init__(self, database: Database, clock: Clock, ids: Ids) -> None:
        self._database, self._ids = database, ids
        self._hold = database.settings.hold
        self._group: GroupCommit[_Draft, None] = GroupCommit(self._send, clock, lambda draft: draft.id)
        self._waiting: dict[Publication, tuple[_Draft, asyncio.Task[None]]] = {}

    @property
    def waiting(self) -> int:
        """Publications that are not on their way yet."""
        return len(self._waiting)

    async def publish(self, publication: Publication) -> None:
        """See ``Publications.publish``."""
        if publication not in self._waiting:
            check(publication)
            if len(self._waiting) >= WAITING:
                message = f"{WAITING} publications wait for PostgreSQL already; publish again when it answers."
                raise DatabaseUnavailable(message)
            draft = _Draft(self._ids.uuid(), publication)
            task = asyncio.create_task(self._group.put(draft, patience=self._hold))
            task.add_done_callback(lambda done: self._settled(draft, done))
            self._waiting[publication] = draft, task
        await asyncio.shield(self._waiting[publication][1])

    def _settled(self, draft: _Draft, task: asyncio.Task[None]) -> None:
        self._sent(draft)
        if not task.cancelled():
            task.exception()  # a publisher that has gone leaves no "exception was never retrieved" behind

    def _sent(self, draft: _Draft) -> None:
        if self._waiting.get(draft.publication, (None,))[0] is draft:
            del self._waiting[draft.publication]

    async def _send(self, drafts: Sequence[_Draft], _: LockWait) -> list[PgmcpError | None]:
        for draft in drafts:
            self._sent(draft)
        await self._database.fetch(
            "publish",
            [draft.id for draft in drafts],
            [draft.publication.change for draft in drafts],
            [draft.publication.uri for draft in drafts],
        )
        return [None] * len(drafts)

    async def read(self, since: Horizon | None) -> PublicationBatch:
        """See ``Publications.read``."""
        rows = await self._database.ask("read_publications", since, MOST + 1)
        found = tuple(Publication(Change(row["kind"]), row["uri"]) for row in rows if row["kind"] is not None)
        return PublicationBatch(Horizon(rows[0]["horizon"]), found[:MOST], more=len(found) > MOST)


async def publish_from_outside(settings: Settings, publications: Sequence[Publication]) -> None:
    """Publish without a node: store all or none on a connection of its own, and wake every node.

    Raises:
        DatabaseUnavailable: PostgreSQL cannot be reached, or does not answer within a statement's time.
        SchemaError: there are no publications in this schema; the message says what to run.
        PublicationRefused: one of them cannot be stored.
    """
    for publication in publications:
        check(publication)
    connection = await connect(settings.database_url)
    try:
        await connection.fetch(
            statement("publish_and_notify", settings.schema_name),
            [publication.change for publication in publications],
            encoding_of(connection).given([publication.uri for publication in publications]),
            channel(settings.schema_name, None),
            PUBLISHED,
            timeout=settings.statement_timeout,
        )
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        raise explained(error, settings.database_url) from error
    finally:
        connection.terminate()


def check(publication: Publication) -> None:
    """Refuse what PostgreSQL would not take.

    Raises:
        PublicationRefused: its uri is missing, too long, or no text that PostgreSQL stores.
    """
    if publication.change is not Change.UPDATED:
        return
    uri = publication.uri or ""
    try:
        fits = 0 < len(uri.encode()) <= LONGEST_URI_BYTES and "\0" not in uri
    except UnicodeEncodeError:
        fits = False
    if not fits:
        what = f"1 to {LONGEST_URI_BYTES} bytes of UTF-8, without NUL"
        message = f"A resource's uri has {what}; this one does not: {uri[:100]!r}"
        raise PublicationRefused(message)
