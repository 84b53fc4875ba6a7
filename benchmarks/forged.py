"""What callers feel of somebody who may connect to the database and floods the channel of all nodes (NOTIFY).

Two pgmcp nodes serve ``echo.py``. Eight sessions, each over the node that does not own it, call at a steady pace, from
a schedule, so that a call that had to wait for the one before it counts its wait. They are measured alone and beside a
flood, in turns. The flooder is a process of its own, with a role that has CONNECT only, and sends made-up ends,
orphans, publications and "read everything" as fast as PostgreSQL takes them. At the end: who was declared dead, and
the nodes' memory.

    python benchmarks/forged.py [--rounds 3] [--seconds 5] [--every 0.05] [--floods 2]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import uvloop
from calls import Client, serving
from measure import cpu, end, machine, percentile, postgres, spawn, spread, table

from pgmcp.store.notifier import channel

SESSIONS = 8
PAUSE = 12.0  # seconds after a flood until a node listens again
SOME = 2000  # payloads of one statement
SAYS = (
    "select pg_notify($1, case n % 5 when 0 then '*' when 1 then 'o,' || n when 2 then 'p,' || n "
    "else 'e' || n || repeat(',e1,e2', 50) end) from generate_series($2::integer, $3::integer) n"
)


async def flood(url: str) -> None:
    """Say what is made up, for ever."""
    hand, n = await asyncpg.connect(url), 0
    while True:
        await hand.execute(SAYS, channel("pgmcp", None), n, n + SOME)
        n = (n + SOME) % 1_000_000_000


async def steady(clients: list[Client], seconds: float, every: float) -> list[float]:
    """Call for a while, each client every so many seconds; the latencies, from when each call was due."""
    took: list[float] = []

    async def one(client: Client, first: float) -> None:
        due = first
        while due < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await client.call()
            took.append(time.perf_counter() - due)
            due += every

    start = time.perf_counter()
    await asyncio.gather(*(one(client, start + number * every / len(clients)) for number, client in enumerate(clients)))
    return took


def resident(pid: int) -> float:
    """A process's memory, in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * 4096 / 2**20


async def prepare(url: str) -> str:
    """A role that may connect, and its address."""
    hand = await asyncpg.connect(url)
    await hand.execute("create role stranger login password 'x'")
    await hand.close()
    at = urlsplit(url)
    return at._replace(netloc=f"stranger:x@{at.hostname}:{at.port}").geturl()


async def compare(given: argparse.Namespace, url: str, nodes: list[tuple[subprocess.Popen[str], int]]) -> None:
    """Measure alone and beside the flood, in turns."""
    stranger = await prepare(url)
    clients = [Client(nodes[number % 2][1]) for number in range(SESSIONS)]
    for client, (_, other) in zip(clients, nodes[::-1] * (SESSIONS // 2), strict=True):
        await client.connect()
        await client.move(other)
    await steady(clients, 2.0, given.every)
    found: dict[str, list[tuple[list[float], float]]] = {"alone": [], "flooded": []}
    memory = [resident(child.pid) for child, _ in nodes]
    for _ in range(given.rounds):
        for kind, results in found.items():
            floods = [spawn("forged.py", "--flood", stranger) for _ in range(given.floods if kind == "flooded" else 0)]
            try:
                before, began = sum(cpu(child.pid) for child, _ in nodes), time.perf_counter()
                took = await steady(clients, given.seconds, given.every)
                share = (sum(cpu(child.pid) for child, _ in nodes) - before) / (time.perf_counter() - began)
                results.append((took, share / len(nodes)))
            finally:
                end(floods)
            if kind == "flooded":
                await asyncio.sleep(PAUSE)
    rows = [
        [
            kind,
            *(spread([percentile(took, part) * 1000 for took, _ in results], ".1f") for part in (0.5, 0.95, 0.99)),
            spread([max(took) * 1000 for took, _ in results], ".0f"),
            spread([share * 100 for _, share in results], ".0f"),
        ]
        for kind, results in found.items()
    ]
    table(("", "p50 ms", "p95 ms", "p99 ms", "max ms", "CPU of a node, %"), rows)
    hand = await asyncpg.connect(url)
    dead = await hand.fetchval("select count(*) from pgmcp.nodes where state = 'dead'")
    await hand.close()
    grown = [f"{before:.0f} to {resident(child.pid):.0f}" for before, (child, _) in zip(memory, nodes, strict=True)]
    print(f"\nnodes declared dead: {dead}; memory of the nodes, MiB: {', '.join(grown)}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measuring run")
    parser.add_argument("--every", type=float, default=0.05, help="seconds between two calls of one session")
    parser.add_argument("--floods", type=int, default=2, help="connections that flood")
    parser.add_argument("--flood", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.flood:
        asyncio.run(flood(given.flood))
        return
    print(machine())
    with (
        postgres() as database,
        serving("pgmcp", "json", database.url) as one,
        serving("pgmcp", "json", database.url) as two,
    ):
        uvloop.run(compare(given, database.url, [one, two]))


if __name__ == "__main__":
    main()
