"""How many buffers each statement of a store looks at: auto_explain tells each connection of what it has just run."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from pgmcp.clock import Clock
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from pgmcp.store.inbox import TableInbox
from pgmcp.store.log import TableLog
from pgmcp.store.takeover import TableTakeovers
from pgmcp.types import NodeId
from tests.harness.stores import IDS, Store

EXPLAIN = """
load 'auto_explain';
set auto_explain.log_min_duration = 0;
set auto_explain.log_analyze = on;
set auto_explain.log_buffers = on;
set auto_explain.log_timing = off;
set auto_explain.log_format = json;
set client_min_messages = log;
"""
NAME = re.compile(r"/\* (\w+) \*/")


class Buffers:
    """What the statements of some connections have looked at, by their names."""

    def __init__(self) -> None:
        self.plans: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)

    def note(self, _connection: object, message: Any) -> None:
        _, _, plan = str(message.message).partition("plan:\n")
        found = NAME.search(plan)
        if plan and found:
            self.plans[found[1]].append(json.loads(plan)["Plan"])

    def most(self, name: str) -> int:
        """Buffers that the most expensive run of a statement looked at, since the last ``clear``."""
        return max(int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]) for plan in self.plans[name])

    def scanned(self, name: str) -> Iterator[tuple[int, str]]:
        """Where the last run of a statement looked: buffers and what each scan of it was."""
        yield from sorted(_scans(self.plans[name][-1]), reverse=True)

    def clear(self) -> None:
        self.plans.clear()


def _scans(plan: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    if "Relation Name" in plan:
        where = plan.get("Index Name") or plan["Relation Name"]
        condition = plan.get("Index Cond", "")
        yield plan["Shared Hit Blocks"], f"{plan['Node Type']} {where} {condition} x{plan['Actual Loops']}"
    for child in plan.get("Plans", ()):
        yield from _scans(child)


class Explained(Database):
    """A pool whose connections tell ``buffers`` what they run."""

    buffers: Buffers

    async def connect(self, url: str, *, timeout: float, **options: Any) -> asyncpg.Connection:
        connection = await super().connect(url, timeout=timeout, **options)
        await connection.execute(EXPLAIN)
        connection.add_log_listener(self.buffers.note)
        return connection


async def _open_gate() -> None:
    return None


@asynccontextmanager
async def explained(address: str, buffers: Buffers, **settings: Any) -> AsyncIterator[Store]:
    """One node's store, whose statements are noted in ``buffers``."""
    node, clock = NodeId(IDS.uuid()), Clock()
    database = Explained(Settings(database_url=address, **settings), clock)
    database.buffers = buffers
    await database.open()
    inbox, log = TableInbox(database, node, clock, IDS, _open_gate), TableLog(database, node, clock, _open_gate)
    try:
        yield Store(node, database, inbox, log, TableTakeovers(database, node, _open_gate))
    finally:
        await database.close()
