"""The ports of several nodes on one database, on PostgreSQL and in memory, with the same handles for a test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg

from pgmcp.clock import Clock
from pgmcp.ports import Inbox, LeaseTable, Log, Notifier, Publications, Takeovers
from pgmcp.settings import Settings
from pgmcp.store.line import Line
from pgmcp.store.nodes import join
from pgmcp.store.notifier import TableNotifier
from pgmcp.store.publications import TablePublications
from pgmcp.types import NodeId, NodeRecord, NodeState, Outcome, RequestKey, SessionKey
from tests.harness.memory import MemoryCluster, MemoryStore, memory_store
from tests.harness.proxy import Cut, Proxy, proxied
from tests.harness.stores import HELD, IDS, Session, check_streams, promote, row_counts, store
from tests.harness.waiting import eventually

LONG = 60.0


async def open_gate() -> None:
    return None


@dataclass(slots=True)
class Ports:
    """What one node has of the store."""

    node: NodeId
    inbox: Inbox
    log: Log
    takeovers: Takeovers
    lease: LeaseTable
    notifier: Notifier
    publications: Publications
    heard: list[str] = field(default_factory=list)


class Bench(ABC):
    """A cluster's database, and what a test can do to it."""

    @abstractmethod
    async def node(self, *, gate: Callable[[], Awaitable[None]] = open_gate, ready: bool = True) -> Ports:
        """A node that has joined."""

    @abstractmethod
    def cut(self, node: Ports, statement: str, where: Cut) -> None:
        """Break the connection of the node that next executes this statement."""

    @abstractmethod
    async def age(self, node: Ports, seconds: float) -> None:
        """Let a node's last renewal be that long ago."""

    @abstractmethod
    async def hang_up(self, node: Ports) -> None:
        """End the backend of a node's line."""

    @abstractmethod
    async def fail_over(self) -> None:
        """Another server goes on with every commit of the former one: a term begins, and all numbers jump."""

    @abstractmethod
    async def counts(self) -> dict[str, int]:
        """How many rows hang off sessions, by table."""

    @abstractmethod
    async def runs(self, key: RequestKey) -> int:
        """How often a request was started."""

    @abstractmethod
    async def outcome(self, key: RequestKey) -> Outcome | None:
        """How a request ended."""

    @abstractmethod
    async def claims(self, session: SessionKey) -> dict[RequestKey, UUID | None]:
        """The claims of a session's unfinished requests."""

    @abstractmethod
    async def history(self, session: SessionKey) -> list[tuple[NodeId, NodeId, int, str]]:
        """A session's changes of owner."""

    @abstractmethod
    async def check_streams(self) -> None:
        """Numbers have no gap, and every stream stands right after its last event."""

    async def die(self, node: Ports) -> None:
        """A node is declared dead, for its lease has run out."""
        observer = await self.node()
        await self.age(node, LONG)

        async def dead() -> bool:
            await observer.lease.renew()
            return bool(await observer.takeovers.condemn(by_lease=True, by_silence=False))

        await eventually(dead, "the node is declared dead")


@dataclass
class Pair:
    """Two nodes, and a session of the first."""

    bench: Bench
    one: Ports
    two: Ports
    session: Session


class TableBench(Bench):
    """PostgreSQL, behind a proxy that can break connections."""

    def __init__(
        self, stack: AsyncExitStack, direct: str, through: str, proxy: Proxy, hand: asyncpg.Connection
    ) -> None:
        self._stack, self._direct, self._through, self._proxy, self._hand = stack, direct, through, proxy, hand
        self._lines: dict[NodeId, Line] = {}

    @classmethod
    async def on(cls, stack: AsyncExitStack, address: str) -> TableBench:
        hand = await asyncpg.connect(address, timeout=10)
        stack.push_async_callback(hand.close)
        proxy, through = await stack.enter_async_context(proxied(address))
        return cls(stack, address, through, proxy, hand)

    async def node(self, *, gate: Callable[[], Awaitable[None]] = open_gate, ready: bool = True) -> Ports:
        made = await self._stack.enter_async_context(store(self._through, gate=gate))
        heard: list[str] = []
        line = Line(
            Settings(database_url=self._direct), made.node, Clock(), IDS,
            on_payload=heard.append, on_broadcast=heard.append, on_reset=lambda **_: None, on_lost=lambda: None,
            database=made.database,
        )  # fmt: skip
        await join(made.database, NodeRecord(made.node, "node", "", "1", ""))
        await line.start()
        self._stack.push_async_callback(line.stop)
        self._lines[made.node] = line
        await line.renew()
        if ready:
            await line.set_state(NodeState.READY)
        publications = TablePublications(made.database, Clock(), IDS)
        return Ports(
            made.node, made.inbox, made.log, made.takeovers, line, TableNotifier(made.database), publications, heard
        )

    def cut(self, node: Ports, statement: str, where: Cut) -> None:
        self._proxy.cut(statement, where)

    async def age(self, node: Ports, seconds: float) -> None:
        await self._hand.execute(
            "update pgmcp.nodes set renewed_at = clock_timestamp() - make_interval(secs => $2), "
            "expires_at = clock_timestamp() - make_interval(secs => $2 - $3) where node_id = $1",
            node.node, seconds, Settings().ttl,
        )  # fmt: skip

    async def hang_up(self, node: Ports) -> None:
        await self._lines[node.node].stop()

        async def gone() -> bool:
            text = (
                "select count(*) from pg_stat_activity where pid = "
                "(select line_pid from pgmcp.nodes where node_id = $1)"
            )
            return bool(await self._hand.fetchval(text, node.node) == 0)

        await eventually(gone, "the line's backend ends")

    async def fail_over(self) -> None:
        await promote(self._hand)

    async def counts(self) -> dict[str, int]:
        return await row_counts(self._hand)

    async def runs(self, key: RequestKey) -> int:
        runs: int = await self._hand.fetchval("select runs from pgmcp.requests where id = $1", key)
        return runs

    async def outcome(self, key: RequestKey) -> Outcome | None:
        text = await self._hand.fetchval("select outcome from pgmcp.requests where id = $1", key)
        return None if text is None else Outcome(text)

    async def claims(self, session: SessionKey) -> dict[RequestKey, UUID | None]:
        text = "select id, claim from pgmcp.requests where session = $1 and finished_at is null"
        return {RequestKey(row["id"]): row["claim"] for row in await self._hand.fetch(text, session)}

    async def history(self, session: SessionKey) -> list[tuple[NodeId, NodeId, int, str]]:
        rows = await self._hand.fetch("select * from pgmcp.takeovers where session = $1 order by id", session)
        return [(row["from_node"], row["to_node"], row["epoch"], row["reason"]) for row in rows]

    async def check_streams(self) -> None:
        await check_streams(self._hand)


class MemoryBench(Bench):
    """The ports in memory."""

    def __init__(self) -> None:
        self._cluster = MemoryCluster(Clock(), Settings())
        self._stores: dict[NodeId, MemoryStore] = {}

    async def node(self, *, gate: Callable[[], Awaitable[None]] = open_gate, ready: bool = True) -> Ports:
        made = memory_store(self._cluster, Clock(), IDS, gate=gate)
        self._stores[made.node] = made
        heard: list[str] = []
        await made.lease.join()
        made.lease.listen(heard.append)
        await made.lease.renew()
        if ready:
            await made.lease.set_state(NodeState.READY)
        return Ports(
            made.node, made.inbox, made.log, made.takeovers, made.lease, made.notifier, made.publications, heard
        )

    def cut(self, node: Ports, statement: str, where: Cut) -> None:
        self._stores[node.node].wire.cut(statement, where)

    async def age(self, node: Ports, seconds: float) -> None:
        row = self._cluster.nodes[node.node]
        row.renewed_at = self._cluster.now() - seconds
        row.expires_at = row.renewed_at + self._cluster.settings.ttl

    async def hang_up(self, node: Ports) -> None:
        self._stores[node.node].lease.hang_up()
        self._stores[node.node].lease.notice()

    async def fail_over(self) -> None:
        self._cluster.begin_term()

    async def counts(self) -> dict[str, int]:
        cluster = self._cluster
        events = sum(len(stream.events) for stream in cluster.streams.values())
        counted = len(cluster.sessions), len(cluster.journal), len(cluster.streams), events, len(cluster.requests)
        return dict(zip(HELD, counted, strict=True))

    async def runs(self, key: RequestKey) -> int:
        return self._cluster.requests[key].runs

    async def outcome(self, key: RequestKey) -> Outcome | None:
        return self._cluster.requests[key].outcome

    async def claims(self, session: SessionKey) -> dict[RequestKey, UUID | None]:
        return {row.key: row.claim for row in self._cluster.requests_of(session) if not row.finished}

    async def history(self, session: SessionKey) -> list[tuple[NodeId, NodeId, int, str]]:
        return [change[1:] for change in self._cluster.takeovers if change[0] == session]

    async def check_streams(self) -> None:
        for stream in self._cluster.streams.values():
            assert sorted(stream.events) == list(range(1, stream.next_seq))
