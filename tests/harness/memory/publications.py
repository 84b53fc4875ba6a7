"""The ``Publications`` port in memory."""

from __future__ import annotations

from uuid import UUID

from pgmcp.clock import Ids
from pgmcp.store.publications import MOST, check
from pgmcp.types import Horizon, Publication, PublicationBatch
from tests.harness.memory.tables import PublicationRow
from tests.harness.memory.wire import Wire


class MemoryPublications:
    """One node's way to publish and to read."""

    def __init__(self, wire: Wire, ids: Ids) -> None:
        self._wire, self._cluster, self._ids = wire, wire.cluster, ids

    async def publish(self, publication: Publication) -> None:
        check(publication)
        key = self._ids.uuid()
        await self._wire.persist("publish", lambda: self._publish(key, publication))

    def _publish(self, key: UUID, publication: Publication) -> None:
        if all(row.key != key for row in self._cluster.publications):
            self._cluster.publications.append(PublicationRow(key, publication, self._cluster.now()))

    async def read(self, since: Horizon | None) -> PublicationBatch:
        return await self._wire.ask("read_publications", lambda: self._read(since))

    def _read(self, since: Horizon | None) -> PublicationBatch:
        rows = self._cluster.publications
        found = tuple(row.publication for row in rows[int(since or 0) :])
        return PublicationBatch(Horizon(str(len(rows))), found[:MOST], more=len(found) > MOST)
