"""The ports in memory: what the store keeps on PostgreSQL, with the same guarantees, for tests that move time.

``tests/ports`` says the guarantees once for both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pgmcp.clock import Clock, Ids
from pgmcp.types import NodeId
from tests.harness.memory.inbox import MemoryInbox
from tests.harness.memory.log import MemoryLog
from tests.harness.memory.publications import MemoryPublications
from tests.harness.memory.tables import MemoryCluster
from tests.harness.memory.takeovers import MemoryLeaseTable, MemoryNotifier, MemoryTakeovers
from tests.harness.memory.wire import MemoryTimeline, Wire

__all__ = ["MemoryCluster", "MemoryStore", "MemoryTimeline", "memory_store"]


async def _open() -> None:
    return None


@dataclass(slots=True)
class MemoryStore:
    """What one node has of the store."""

    node: NodeId
    wire: Wire
    inbox: MemoryInbox
    log: MemoryLog
    takeovers: MemoryTakeovers
    lease: MemoryLeaseTable
    notifier: MemoryNotifier
    publications: MemoryPublications


def memory_store(
    cluster: MemoryCluster,
    clock: Clock,
    ids: Ids,
    *,
    running: Callable[[], Awaitable[None]] = _open,
    gate: Callable[[], Awaitable[None]] = _open,
    timeline: MemoryTimeline | None = None,
) -> MemoryStore:
    """One node's store.

    Args:
        clock: the node's own time.
        running: returns when the node's process runs.
        gate: awaited before each write of an owner.
        timeline: what the node's process follows; None for that of a process that begins.
    """
    node = NodeId(ids.uuid())
    wire = Wire(cluster, node, clock, timeline or MemoryTimeline(cluster), running=running, gate=gate)
    return MemoryStore(
        node, wire, MemoryInbox(wire, ids), MemoryLog(wire), MemoryTakeovers(wire), MemoryLeaseTable(wire),
        MemoryNotifier(wire), MemoryPublications(wire, ids),
    )  # fmt: skip
