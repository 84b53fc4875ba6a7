"""The node's own row, as far as it is not written on the line."""

from __future__ import annotations

from pgmcp.store.database import Database
from pgmcp.types import NodeRecord


async def join(database: Database, record: NodeRecord) -> None:
    """Write the row of a node that joins; a repeat finds its own row.

    Raises:
        DatabaseUnavailable: PostgreSQL does not answer.
    """
    await database.persist(
        "join",
        record.node_id,
        record.name,
        record.address,
        database.settings.ttl,
        record.version,
        record.schema_revision,
        record.capacity,
        patience=database.settings.statement_timeout,
    )
