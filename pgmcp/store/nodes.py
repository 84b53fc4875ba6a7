"""The node's own row, as far as it is not written on the line."""

from __future__ import annotations

from pgmcp.store.database import Database
from pgmcp.types import NodeId, NodeRecord, NodeState


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


async def own_state(database: Database, node: NodeId) -> NodeState | None:
    """The state in a node's row; None when it was removed.

    Raises:
        DatabaseUnavailable: PostgreSQL does not answer.
    """
    rows = await database.ask("own_state", node)
    return NodeState(rows[0]["state"]) if rows else None
