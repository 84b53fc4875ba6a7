"""What a held snapshot costs: two nodes, eight sessions calling over both in turn, before, while and after it is held.

Another application's transaction has read once and idles. Calls per second and p99 in windows of ten seconds; the mean
of each statement and the buffers that it looks at, by pg_stat_statements, before and in the last half of the hold.
Afterwards the snapshot is let go of, what is over is removed (retention is 10 s here), and the tables are vacuumed.

    python benchmarks/snapshot.py [--before 30] [--hold 120] [--sessions 8] [--wrote]

``--wrote``: the transaction has also written, as a forgotten ``begin`` does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import time
from typing import Any

import asyncpg
import uvloop
from calls import Client
from measure import ROOT, SCHEMA, end, machine, percentile, postgres, spawn, table
from memory import ready

from pgmcp.embedded import EmbeddedPostgres, free_port
from pgmcp.store.statements import names, statement

NODES = 2
WINDOW = 10.0
SIZES = "select relname, pg_total_relation_size(relid) as bytes from pg_stat_user_tables where schemaname = $1"
MEANS = """
select query, calls::float8 as calls, total_exec_time as ms, (shared_blks_hit + shared_blks_read)::float8 as buffers
  from pg_stat_statements where toplevel
"""
LITERALS = re.compile(r"/\*.*?\*/|--[^\n]*|'[^']*'|\$\d+|\b(?:\d+|true|false|null)\b|\s+", re.IGNORECASE)
Took = list[tuple[float, float]]


class Member(Client):
    """One session with a connection to each node."""

    async def connect(self) -> None:
        await super().connect()
        self.links = {self._port: (self._reader, self._writer)}

    async def over(self, port: int) -> float:
        if port not in self.links:
            self.links[port] = await asyncio.open_connection("127.0.0.1", port)
        self._reader, self._writer = self.links[port]
        return await self.call()


async def keep_calling(client: Member, ports: list[int], first: int, took: Took) -> None:
    number = first
    while True:
        seconds = await client.over(ports[number % len(ports)])
        took.append((time.monotonic(), seconds))
        number += 1


async def windows(took: Took, seconds: float, title: str) -> list[tuple[float, float]]:
    """Rate and p99 (ms) of each window."""
    found = []
    for number in range(max(1, round(seconds / WINDOW))):
        start = time.monotonic()
        await asyncio.sleep(min(WINDOW, seconds))
        now = time.monotonic()
        each = [value for at, value in took if at >= start]
        found.append((len(each) / (now - start), percentile(each, 0.99) * 1000))
        print(f"{title} {number * WINDOW:5.0f} s: {found[-1][0]:6.0f} calls/s, p99 {found[-1][1]:6.1f} ms", flush=True)
    return found


async def means(admin: asyncpg.Connection) -> dict[str, tuple[float, float, float]]:
    """Calls, mean (ms) and buffers a call of each statement since the last time; forgets them."""
    named = {LITERALS.sub("", statement(name, SCHEMA)): name for name in names()}
    found: dict[str, tuple[float, float, float]] = {}
    for row in await admin.fetch(MEANS):
        if name := named.get(LITERALS.sub("", row["query"])):
            before = found.get(name, (0.0, 0.0, 0.0))
            found[name] = before[0] + row["calls"], before[1] + row["ms"], before[2] + row["buffers"]
    await admin.execute("select pg_stat_statements_reset()")
    return {name: (calls, ms / calls, buffers / calls) for name, (calls, ms, buffers) in found.items()}


async def sizes(admin: asyncpg.Connection) -> dict[str, int]:
    return {row["relname"]: row["bytes"] for row in await admin.fetch(SIZES, SCHEMA)}


def summary(found: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(rate for rate, _ in found) / len(found), sorted(p99 for _, p99 in found)[len(found) // 2]


async def run(server: EmbeddedPostgres, ports: list[int], given: argparse.Namespace) -> None:
    for port in ports * 3:  # a busy machine is slow to start them
        with contextlib.suppress(TimeoutError):
            await ready(port)
    admin, other = await asyncpg.connect(server.url), await asyncpg.connect(server.url)
    await admin.execute("create extension pg_stat_statements")
    took: Took = []
    clients = [Member(ports[number % NODES]) for number in range(given.sessions)]
    for client in clients:
        await client.connect()
    calling = [asyncio.create_task(keep_calling(client, ports, number, took)) for number, client in enumerate(clients)]
    await windows(took, WINDOW, "warm  ")
    await means(admin)
    before = await windows(took, given.before, "before")
    first, small = await means(admin), await sizes(admin)
    await other.execute(f"begin isolation level repeatable read; select count(*) from {SCHEMA}.sessions")
    if given.wrote:
        await other.execute("create table elsewhere (n integer)")
    held = await windows(took, given.hold / 2, "held  ")
    await means(admin)
    late = await windows(took, given.hold / 2, "held  ")
    last, large = await means(admin), await sizes(admin)
    await other.close()
    after = await windows(took, 2 * WINDOW, "after ")
    for task in calling:
        task.cancel()
    await asyncio.wait(calling)
    await asyncio.sleep(60)
    await admin.execute("vacuum")
    report(first, last, before, held + late, late, after)
    rest = await sizes(admin)
    table(
        ["KB", "before", "held", "after"],
        [[n, *(f"{x.get(n, 0) // 1024}" for x in (small, large, rest))] for n in rest],
    )
    await admin.close()


def report(first: dict[str, Any], last: dict[str, Any], *parts: list[tuple[float, float]]) -> None:
    (rate, p99), *others = (summary(part) for part in parts)
    for title, (calls, slow) in zip(("held", "its last half", "after"), others, strict=True):
        print(f"{title}: {calls / rate:.2f} of the calls/s before, p99 {slow / p99:.2f} times that before")
    rows = []
    for name in sorted(last, key=lambda each: -last[each][0] * last[each][1]):
        _, ms, buffers = first.get(name, (0, 0, 0))
        count, late, most = last[name]
        rows.append([name, f"{count:.0f}", f"{ms:.2f}", f"{late:.2f}", f"{buffers:.0f}", f"{most:.0f}"])
    table(["statement", "runs", "ms before", "ms held", "buffers before", "buffers held"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=float, default=30)
    parser.add_argument("--hold", type=float, default=120)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--wrote", action="store_true")
    given = parser.parse_args()
    print(machine())
    with postgres(shared_preload_libraries="pg_stat_statements") as server:
        ports = [free_port() for _ in range(NODES)]
        env = {"PGMCP_DATABASE_URL": server.url, "PGMCP_RETENTION": "10", "PYTHONPATH": str(ROOT)}
        target = f"{ROOT / 'benchmarks' / 'echo.py'}:mcp"
        nodes = [spawn("-m", "pgmcp", "serve", target, "--port", str(port), env=env) for port in ports]
        try:
            uvloop.run(run(server, ports, given))
        finally:
            end(nodes)


if __name__ == "__main__":
    main()
