"""Whether anything grows: three nodes under a steady load, the sizes of every table and process once a minute.

Sessions that stay call over all nodes in turn, hold a standalone stream that moves to the next node every minute, and
are told of resources on it. Sessions that go come once a second, call a few times, and are deleted or left to expire.
What is over is kept for five minutes (the default retention), so that the load has run for some time before the first
third of the samples that count; growth is the median of the last third against that of the first.

    python benchmarks/steady.py [--minutes 60] [--settle 15] [--staying 12] [--every 0.5]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from calls import Client
from mcp.server.mcpserver import Context, MCPServer
from measure import ROOT, SCHEMA, end, machine, percentile, postgres, spawn, table
from memory import KB, backends, memory, ready

from pgmcp.embedded import EmbeddedPostgres, free_port

NODES = 3
MINUTE = 60.0
IDLE = "300"  # seconds after which sessions that were left expire

mcp = MCPServer("steady", log_level="WARNING")


@mcp.tool()
async def echo(text: str) -> str:
    return text


@mcp.tool()
async def announce(text: str, ctx: Context) -> str:
    await ctx.session.send_resource_updated(f"steady://{text}")
    return text


@dataclass
class Done:
    """What the clients did and saw."""

    took: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Member(Client):
    """One session with a connection to each node."""

    def __init__(self, ports: list[int], first: int) -> None:
        super().__init__(ports[first % NODES])
        self._ports = ports
        self._links: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def turn(self, number: int) -> None:
        """Speak over the next node from now on."""
        port = self._ports[number % NODES]
        if port not in self._links:
            self._links[port] = await asyncio.open_connection("127.0.0.1", port)
        self._reader, self._writer = self._links[port]

    async def connect(self) -> None:
        await super().connect()
        self._links[self._port] = self._reader, self._writer

    async def announce(self, text: str) -> None:
        params = {"name": "announce", "arguments": {"text": text}}
        _, body = await self._post({"jsonrpc": "2.0", "id": f"a{text}", "method": "tools/call", "params": params})
        if text.encode() not in body:
            message = f"wrong answer: {body!r}"
            raise RuntimeError(message)

    async def delete(self) -> None:
        self._writer.write(b"DELETE /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\n%s\r\n" % self._session)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 20" not in head[:20]:
            message = f"not deleted: {head!r}"
            raise RuntimeError(message)

    async def heard(self, number: int, last: bytes) -> AsyncGenerator[tuple[bytes, bytes]]:
        """The standalone stream over the next node: id and data of each event."""
        port = self._ports[number % NODES]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            resumed = b"last-event-id: %s\r\n" % last if last else b""
            head = b"GET /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n%s%s\r\n"
            writer.write(head % (self._session, resumed))
            if b" 200 " not in (answer := await reader.readuntil(b"\r\n\r\n"))[:20]:
                message = f"no stream: {answer!r}"
                raise RuntimeError(message)
            event = b""
            while line := await reader.readline():
                if line.startswith(b"id:"):
                    event = line[3:].strip()
                elif line.startswith(b"data:"):
                    yield event, line[5:].strip()
        finally:
            writer.close()

    def close(self) -> None:
        for _, writer in self._links.values():
            writer.close()


async def stay(ports: list[int], name: int, every: float, going: Callable[[], bool], done: Done) -> None:
    """One session for the whole time."""
    client = Member(ports, name)
    await client.connect()
    told: set[str] = set()

    async def listen() -> None:
        last = b""
        for number in itertools.count(name + 1):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MINUTE), contextlib.aclosing(client.heard(number, last)) as events:
                    async for event, data in events:
                        last = event
                        if b"steady://" in data:
                            uri = json.loads(data)["params"]["uri"]
                            done.counts["told twice"] += uri in told
                            told.add(uri)

    ears = asyncio.create_task(listen())
    announced: set[str] = set()
    due = time.monotonic() + every * name / 10
    for number in itertools.count():
        due += every
        await asyncio.sleep(due - time.monotonic())
        if not going():
            break
        await client.turn(number)
        if number % 10 == 9:
            await client.announce(f"{name}-{number}")
            announced.add(f"steady://{name}-{number}")
        else:
            done.took.append(await client.call())
    await asyncio.sleep(1)
    ears.cancel()
    await asyncio.wait([ears])
    if not ears.cancelled():
        ears.result()
    done.counts["announced"] += len(announced)
    done.counts["not told"] += len(announced - told)
    client.close()


async def come_and_go(ports: list[int], number: int, done: Done) -> None:
    """A session of a few calls, deleted or left."""
    client = Member(ports, number)
    await client.connect()
    for turn in range(5):
        await client.turn(number + turn)
        done.took.append(await client.call())
    if number % 2:
        await client.delete()
    client.close()
    done.counts["sessions that went"] += 1


async def load(ports: list[int], given: argparse.Namespace, done: Done) -> None:
    until = time.monotonic() + given.minutes * MINUTE

    async def goers() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in itertools.count():
                if time.monotonic() > until:
                    return
                tasks.create_task(guarded(come_and_go(ports, number, done)))
                await asyncio.sleep(1)

    async def guarded(work: Any) -> None:
        try:
            await work
        except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
            done.failures.append(repr(error))

    going = lambda: time.monotonic() < until  # noqa: E731
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(goers())
        for name in range(given.staying):
            tasks.create_task(guarded(stay(ports, name, given.every, going, done)))


async def sample(server: EmbeddedPostgres, pids: list[int]) -> dict[str, float]:
    """The sizes of this moment, in KB."""
    connection = await asyncpg.connect(server.url)
    try:
        rows = await connection.fetch(
            "select relname, pg_total_relation_size(relid) as bytes from pg_stat_user_tables where schemaname = $1",
            SCHEMA,
        )
    finally:
        await connection.close()
    sizes = {f"table {row['relname']}": row["bytes"] / KB for row in rows}
    sizes |= {f"node {number}, RSS": memory(pid)[0] / KB for number, pid in enumerate(pids, start=1)}
    return sizes | {"PostgreSQL, PSS": backends(server.pid) / KB}


async def hot(server: EmbeddedPostgres) -> tuple[int, int]:
    """Updates of ``nodes``, and how many of them were heap-only."""
    connection = await asyncpg.connect(server.url)
    try:
        [row] = await connection.fetch(
            "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where schemaname = $1 and relname = 'nodes'",
            SCHEMA,
        )
    finally:
        await connection.close()
    return row[0], row[1]


async def run(
    ports: list[int], pids: list[int], server: EmbeddedPostgres, given: argparse.Namespace
) -> tuple[Done, list[dict[str, float]]]:
    for port in ports:
        await ready(port)
    done, samples = Done(), []
    work = asyncio.create_task(load(ports, given, done))
    start = time.monotonic()
    for minute in itertools.count(1):
        await asyncio.wait([work], timeout=max(0.0, start + minute * MINUTE - time.monotonic()))
        if work.done():
            break
        samples.append(await sample(server, pids))
        print(minute, json.dumps({name: round(size) for name, size in samples[-1].items()}), file=sys.stderr)
    await work
    return done, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--settle", type=int, default=15, help="minutes before the first sample that counts")
    parser.add_argument("--staying", type=int, default=12)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two calls of a session that stays")
    given = parser.parse_args()
    print(machine())
    with postgres() as server:
        ports = [free_port() for _ in range(NODES)]
        paths = f"{ROOT}:{Path(__file__).parent}"
        env = {"PGMCP_DATABASE_URL": server.url, "PGMCP_IDLE_TIMEOUT": IDLE, "PYTHONPATH": paths}
        env["PGMCP_MAX_SESSIONS_PER_CALLER"] = "10000"  # all come from one address
        target = f"{Path(__file__).resolve()}:mcp"
        nodes = [spawn("-m", "pgmcp", "serve", target, "--port", str(port), env=env) for port in ports]
        try:
            done, samples = uvloop.run(run(ports, [node.pid for node in nodes], server, given))
            updates, heap_only = uvloop.run(hot(server))
        finally:
            end(nodes)
    calls = len(done.took)
    print(
        f"{calls} calls, p50 {percentile(done.took, 0.5) * 1000:.1f} ms, p99 {percentile(done.took, 0.99) * 1000:.1f}"
    )
    print(", ".join(f"{name}: {count}" for name, count in sorted(done.counts.items())))
    print(f"{len(done.failures)} failures {done.failures[:3]}")
    print(f"renewals: {updates} updates of nodes, {heap_only / max(1, updates):.4f} of them heap-only\n")
    counted = samples[given.settle :]
    third = max(1, len(counted) // 3)
    rows = []
    for name in counted[0] if counted else ():
        first, last = (statistics.median(each[name] for each in part) for part in (counted[:third], counted[-third:]))
        most = max(each[name] for each in counted)
        rows.append([name, f"{first:.0f}", f"{last:.0f}", f"{most:.0f}", f"{(last - first) / first:+.1%}"])
    table(["KB", "first third", "last third", "most", "growth"], rows)


if __name__ == "__main__":
    main()
