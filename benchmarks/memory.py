"""What a session and an open stream cost in memory: of the node, of PostgreSQL, and on PostgreSQL's disk.

One pgmcp node serves ``echo.py``. Sessions are opened, do their handshake and one call, and fall idle; then each opens
its standalone stream with GET, on a connection of its own. Each step is done with a few first, so that what is loaded
once does not count, and counted when the node's memory has settled.

    python benchmarks/memory.py [--sessions 1000] [--trace]

``--trace`` names, instead, the lines of Python that hold what an idle session costs (tracemalloc, in the node).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import asyncpg
import uvloop
from calls import TARGET, Client
from measure import SCHEMA, end, machine, postgres, spawn, table

from pgmcp.embedded import EmbeddedPostgres, free_port

FIRST = 50  # sessions before the first count
AT_ONCE = 10
LIMIT = 300.0  # seconds that all of it may take
SETTLED = 0.5  # seconds between two looks that agree
KB = 1024
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Count:
    """Bytes at one moment."""

    rss: int
    pss: int
    backends: int
    tables: int


def memory(pid: int) -> tuple[int, int]:
    """RSS and PSS of a process, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()[1:]
    found = {name: int(rest.split()[0]) * KB for name, _, rest in (line.partition(":") for line in lines)}
    return found["Rss"], found["Pss"]


def backends(postmaster: int) -> int:
    """PSS of PostgreSQL's processes, in bytes: the postmaster and its children."""
    total = memory(postmaster)[1]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text("ascii", "replace").rpartition(")")[2].split()[1] == str(postmaster):
                total += memory(int(stat.parent.name))[1]
    return total


async def counted(pid: int, server: EmbeddedPostgres) -> Count:
    """Count when the node's memory does not change any more."""
    for last in iter(lambda: memory(pid)[0], None):
        await asyncio.sleep(SETTLED)
        if memory(pid)[0] == last:
            break
    connection = await asyncpg.connect(server.url)
    try:
        tables = await connection.fetchval(
            "select sum(pg_total_relation_size(oid)) from pg_class "
            "where relkind = 'r' and relnamespace = $1::regnamespace",
            SCHEMA,
        )
    finally:
        await connection.close()
    return Count(*memory(pid), backends(server.pid), int(tables))


# -- the client's side -------------------------------------------------------------------------------------------------


async def opened(port: int) -> Client:
    """A session that has called once; its connection is closed."""
    client = Client(port)
    await client.connect()
    await client.call()
    client._writer.close()  # noqa: SLF001
    return client


async def listening(port: int, client: Client) -> asyncio.StreamWriter:
    """The session's standalone stream, open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"GET /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n%s\r\n"
    writer.write(head % client._session)  # noqa: SLF001
    answer = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in answer[:20]:
        message = f"no stream: {answer!r}"
        raise RuntimeError(message)
    return writer


async def ready(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(OSError, RuntimeError):
                await opened(port)
                return
            await asyncio.sleep(0.1)


async def each(count: int, work: Callable[[int], Awaitable[T]]) -> list[T]:
    """Do the work ``count`` times, a few at once."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> T:
        async with turns:
            return await work(number)

    return await asyncio.gather(*(one(number) for number in range(count)))


async def measured(port: int, pid: int, server: EmbeddedPostgres, count: int) -> list[tuple[str, int, Count, Count]]:
    async with asyncio.timeout(LIMIT):
        await ready(port)
        first = await each(FIRST, lambda _: opened(port))
        start = await counted(pid, server)
        clients = await each(count, lambda _: opened(port))
        idle = await counted(pid, server)
        writers = await each(FIRST, lambda number: listening(port, first[number]))
        before = await counted(pid, server)
        writers += await each(count, lambda number: listening(port, clients[number]))
        streaming = await counted(pid, server)
    for writer in writers:
        writer.close()
    return [("idle session", count, start, idle), ("open GET stream", count, before, streaming)]


# -- the trace: this file is the node's target -------------------------------------------------------------------------


def _trace() -> None:
    """Start tracing in the node; each SIGUSR1 prints what was added since the one before."""
    tracemalloc.start(1)
    last: list[tracemalloc.Snapshot] = []

    def look(_: int, __: FrameType | None) -> None:
        now = tracemalloc.take_snapshot()
        for line in now.compare_to(last[-1], "lineno")[:25] if last else ():
            at = line.traceback[0]
            print(f"{line.size_diff / KB:9.1f} KB {line.count_diff:8d}  {at.filename}:{at.lineno}", file=sys.stderr)
        last.append(now)

    signal.signal(signal.SIGUSR1, look)


if os.environ.get("PGMCP_BENCH_TRACE"):
    _trace()
    from echo import mcp  # noqa: F401 - the node looks for it here


async def traced(port: int, pid: int, count: int) -> None:
    async with asyncio.timeout(LIMIT):
        await ready(port)
        await each(FIRST, lambda _: opened(port))
        for sessions in (0, count):
            await each(sessions, lambda _: opened(port))
            await asyncio.sleep(2)
            os.kill(pid, signal.SIGUSR1)
        await asyncio.sleep(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--trace", action="store_true")
    given = parser.parse_args()
    print(machine())
    with postgres() as server:
        port = free_port()
        most = str(2 * (given.sessions + FIRST))
        env = {"PGMCP_DATABASE_URL": server.url, "PYTHONPATH": str(Path(__file__).parent), "PGMCP_MAX_SESSIONS": most}
        env |= {"PGMCP_MAX_SESSIONS_PER_CALLER": most, "PGMCP_INITIALIZE_RATE": "0"}  # all come from one address
        target = TARGET
        if given.trace:
            env["PGMCP_BENCH_TRACE"], target = "1", f"{Path(__file__).resolve()}:mcp"
        node = spawn("-m", "pgmcp", "serve", target, "--port", str(port), env=env)
        try:
            if given.trace:
                uvloop.run(traced(port, node.pid, given.sessions))
                return
            steps = uvloop.run(measured(port, node.pid, server, given.sessions))
        finally:
            end([node])
    rows = [
        [name, str(count), *(f"{(getattr(after, part) - getattr(before, part)) / count / KB:.1f}"
         for part in ("rss", "pss", "backends", "tables")), f"{after.rss / KB / KB:.0f}"]
        for name, count, before, after in steps
    ]  # fmt: skip
    head = ["each", "how many", "node RSS KB", "node PSS KB", "PostgreSQL PSS KB", "tables KB", "node RSS MB in all"]
    table(head, rows)


if __name__ == "__main__":
    main()
