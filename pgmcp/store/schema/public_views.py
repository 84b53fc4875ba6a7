"""The public views and their columns: a contract, they only grow."""

from __future__ import annotations

import asyncpg

from pgmcp.store.schema.revisions import LOOK_SECONDS

COLUMNS: dict[str, tuple[str, ...]] = {
    "live_nodes": (
        "node_id", "node_name", "state", "address", "lease_remaining", "sessions", "streams", "started_at", "version",
    ),
    "live_sessions": (
        "session_id", "node_name", "node_id", "epoch", "transport", "protocol_version", "client_name",
        "client_version", "principal", "created_at", "last_active_at", "in_flight", "open_streams",
    ),
    "live_requests": ("session_id", "request_id", "method", "name", "node_name", "state", "received_at", "age"),
    "live_streams": ("session_id", "kind", "request_id", "sink_node", "next_seq", "lag"),
    "takeover_history": ("session_id", "from_node", "to_node", "epoch", "reason", "at"),
}  # fmt: skip

_PRESENT = """
select c.relname::text as view, array_agg(a.attname::text) as columns
  from pg_catalog.pg_class c
  join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.relnamespace = to_regnamespace(quote_ident($1)) and c.relkind = 'v'
 group by c.relname
"""


async def missing(connection: asyncpg.Connection, schema: str) -> list[str]:
    """What the database lacks of the public views, as ``view`` or ``view.column``."""
    rows = await connection.fetch(_PRESENT, schema, timeout=LOOK_SECONDS)
    present: dict[str, set[str]] = {row["view"]: set(row["columns"]) for row in rows}
    lacking = [view for view in COLUMNS if view not in present]
    for view in present.keys() & COLUMNS.keys():
        lacking += [f"{view}.{column}" for column in COLUMNS[view] if column not in present[view]]
    return sorted(lacking)
