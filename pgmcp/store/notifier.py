"""NOTIFY: a channel for each node of a schema, and one for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from pgmcp.store.database import Database
from pgmcp.types import NodeId


def channel(schema: str, node: NodeId | None) -> str:
    """The channel of a node (None: of all nodes) of one schema: at most 63 bytes, unlike any other schema's."""
    scope = sha256(schema.encode()).hexdigest()[:16]
    return f"pgmcp_{scope}_{'all' if node is None else node.hex}"


class TableNotifier:
    """The ``Notifier`` port: NOTIFY on the channels of one schema, over the pool."""

    def __init__(self, database: Database) -> None:
        self._database, self._schema = database, database.settings.schema_name

    async def notify(self, payloads: Sequence[tuple[NodeId | None, str]]) -> None:
        """See ``Notifier.notify``."""
        channels = [channel(self._schema, node) for node, _ in payloads]
        await self._database.ask("notify", channels, [payload for _, payload in payloads])
