"""Several nodes in one event loop, each with its own real HTTP server: quick, and open to the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import asyncpg
import uvicorn

from pgmcp.clock import Clock, Ids
from pgmcp.node import KEEP_ALIVE_SECONDS, Incarnation, Node
from pgmcp.node.http_protocol import limited
from pgmcp.session.actor import Actor
from pgmcp.session.sdk.bus import PostgresSubscriptionBus
from pgmcp.session.target import load
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from pgmcp.store.retention import Retention
from pgmcp.types import SessionKey
from pgmcp.web.bodies import Bodies
from pgmcp.web.modern import Modern
from tests.harness.pooler import way_to
from tests.harness.schemas import remember
from tests.harness.waiting import eventually

START = 20.0
remember()
EXAMPLES = Path(__file__).parents[2] / "examples"


def everything() -> object:
    """A fresh everything server: the memory of one more process."""
    return load(f"{EXAMPLES / 'everything.py'}:mcp")


@dataclass(slots=True)
class RunningNode:
    """A node and where it listens."""

    node: Node
    url: str

    @property
    def incarnation(self) -> Incarnation:
        """The node's present incarnation."""
        return self.node.incarnation()

    @property
    def present(self) -> Incarnation | None:
        """The incarnation, if the node is part of the cluster."""
        return self.node.supervisor.present

    @property
    def database(self) -> Database:
        """The node's connections."""
        return self.node.database

    @property
    def bodies(self) -> Bodies:
        """The bodies that it holds in memory."""
        return self.node.bodies

    @property
    def modern(self) -> Modern:
        """What it answers without a session."""
        return self.node.modern

    @property
    def bus(self) -> PostgresSubscriptionBus:
        """Where its server publishes."""
        bus = self.node.target.bus
        assert isinstance(bus, PostgresSubscriptionBus)
        return bus

    @property
    def actors(self) -> dict[SessionKey, Actor]:
        """The actors that live here, by session."""
        return self.incarnation.host.actors

    @property
    def retention(self) -> Retention:
        """What ends sessions and prunes streams."""
        return self.incarnation.retention

    async def sweep(self) -> None:
        """Do one round of its retention now."""
        await self.incarnation.sweep()

    async def leave(self) -> None:
        """Leave the cluster for good; what is served without a session goes on."""
        self.node.draining = True
        await self.node.supervisor.stop()


@contextlib.asynccontextmanager
async def cluster(
    database: str, served: Callable[[], object], count: int = 2, clock: Callable[[], Clock] = Clock, **settings: Any
) -> AsyncIterator[Sequence[RunningNode]]:
    """Run ``count`` nodes, each serving an object of its own from ``served``."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running_node(database, served(), f"n{number}", clock(), **settings))
            for number in range(1, count + 1)
        ]


@contextlib.asynccontextmanager
async def running_node(
    database: str, served: object, name: str, clock: Clock, ids: Ids | None = None, **settings: Any
) -> AsyncIterator[RunningNode]:
    """Run one node on a free port until the context ends."""
    with way_to(database, settings) as way:
        node = Node(Settings(node_name=name, port=0, **way), served, clock=clock, ids=ids)
        async with serving(node.application(), http=limited(node.settings)) as url:
            try:
                yield RunningNode(node, url)
            finally:
                node.stop_streams()


@contextlib.asynccontextmanager
async def serving(
    app: Any,
    *,
    access_log: bool = False,
    log_level: str = "warning",
    lifespan: Literal["on", "off"] = "on",
    http: Any = "auto",
) -> AsyncIterator[str]:
    """Run any ASGI application on a free port; where it listens."""
    config = uvicorn.Config(
        app,
        port=0,
        http=http,
        access_log=access_log,
        log_level=log_level,
        lifespan=lifespan,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(START):
            while not server.started:
                if task.done():
                    await task
                    message = "the application did not start"
                    raise RuntimeError(message)
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.wait({task}, timeout=START)


def owner_of(nodes: Sequence[RunningNode], session: SessionKey) -> RunningNode:
    """The node that runs a session's actor."""
    return next(node for node in nodes if session in node.actors)


class Tables:
    """The database as the truth: what lies in it, without asking any node."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection, self._turn = connection, asyncio.Lock()

    async def value(self, query: str, *args: object) -> Any:
        """Return the one value of a query."""
        async with self._turn:
            return await self.connection.fetchval(query, *args)

    async def rows(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Return all rows of a query."""
        async with self._turn:
            return list(await self.connection.fetch(query, *args))

    async def execute(self, query: str, *args: object) -> str:
        """Run a statement."""
        async with self._turn:
            return str(await self.connection.execute(query, *args))

    async def lines(self) -> dict[str, int]:
        """The backends of the nodes' lines, by the names that they go by."""
        query = "select application_name as name, pid from pg_stat_activity where datname = current_database() "
        return {row["name"]: row["pid"] for row in await self.rows(query + "and application_name like '% line'")}

    async def end_lines(self) -> dict[str, int]:
        """End the backends of the nodes' lines; which they were."""
        lines = await self.lines()
        await self.rows("select pg_terminate_backend(pid) from unnest($1::int[]) pid", list(lines.values()))
        return lines

    async def counts(self) -> dict[str, int]:
        """How many rows each table of pgmcp has."""
        names = await self.rows("select tablename from pg_tables where schemaname = 'pgmcp' order by tablename")
        return {row["tablename"]: await self.value(f"select count(*) from pgmcp.{row['tablename']}") for row in names}

    async def dump(self) -> dict[str, list[bytes]]:
        """Every text and bytea of every table, as bytes."""
        columns = await self.rows(
            "select table_name, column_name, data_type from information_schema.columns "
            "where table_schema = 'pgmcp' and data_type in ('text', 'bytea', 'character varying') "
            "and table_name in (select tablename from pg_tables where schemaname = 'pgmcp')"
        )
        found: dict[str, list[bytes]] = {}
        for column in columns:
            table, name = column["table_name"], column["column_name"]
            values = await self.rows(f'select "{name}" as value from pgmcp.{table} where "{name}" is not null')
            found[f"{table}.{name}"] = [
                row["value"] if isinstance(row["value"], bytes) else row["value"].encode() for row in values
            ]
        return found


@contextlib.asynccontextmanager
async def lost_lines(nodes: Sequence[RunningNode], tables: Tables) -> AsyncIterator[None]:
    """End the lines of all nodes; they are open again when the context ends."""
    before = await tables.end_lines()
    yield
    for node in nodes:
        name = f"pgmcp {node.node.settings.node_name} line"

        async def reopened(node: RunningNode = node, name: str = name) -> bool:
            return (await tables.lines()).get(name) not in {None, before[name]} and node.incarnation.line.up

        await eventually(reopened, "the line is open again")


@contextlib.asynccontextmanager
async def tables_of(database: str) -> AsyncIterator[Tables]:
    """Look into a cluster's database."""
    connection = await asyncpg.connect(database)
    try:
        yield Tables(connection)
    finally:
        await connection.close()
