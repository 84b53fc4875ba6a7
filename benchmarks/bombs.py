"""What the others feel of strangers who send bodies that are made to cost: lists in lists, by the million.

One pgmcp cluster of two nodes serves ``echo.py``. Eight sessions call a tool at a steady pace, from a schedule, on the
first node. Beside them another process attacks that node: over four connections, as fast as they are answered, it sends
bombs

    made-up     into a session that does not exist
    own         into a session of its own
    modern      without a session (2026-07-28)

or, on 200 connections, bodies that are never finished (trickle), or headers without an end (headers).

    python benchmarks/bombs.py [--rounds 2] [--seconds 3] [--only made-up,own,modern,trickle,headers]

What has to hold: p99 below 250 ms, no node declared dead, and memory that does not grow with the attack.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import uvloop
from calls import TARGET
from measure import end, machine, percentile, postgres, spawn, spread, table
from neighbours import SESSIONS, connected, paced, ready

from pgmcp.embedded import free_port

CONNECTIONS, TRICKLES = 4, 200
LISTS = b",".join([b"[" * 90 + b"]" * 90] * 22_000)
BOMB = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":[%s]}}}' % LISTS
HEAD = (
    b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json, text/event-stream\r\n"
    b"content-type: application/json\r\n%scontent-length: %d\r\n\r\n"
)


# -- the strangers (a process of their own) ----------------------------------------------------------------------------


async def bombs(port: int, headers: bytes) -> None:
    """Send bombs over one connection, the next one when the last one was answered."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while True:
                writer.write(HEAD % (headers, len(BOMB)) + BOMB)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                if b"content-length: " not in answer:
                    break
                await reader.readexactly(int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0]))


async def trickle(port: int) -> None:
    """Declare a large body and send most of it, then a byte now and then."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD % (b"", 4_000_000) + b" " * 3_900_000)
            for _ in range(100):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.5)
            writer.close()


async def endless(port: int) -> None:
    """Headers without an end."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /mcp HTTP/1.1\r\n")
            while True:
                writer.write(b"x-header: " + b"x" * 1000 + b"\r\n")
                await writer.drain()


async def own(port: int) -> None:
    """Bombs of a caller who has a session."""
    client = await connected(port)
    await bombs(port, client._session)  # noqa: SLF001


STRANGERS: dict[str, tuple[int, Callable[[int], Awaitable[None]]]] = {
    "made-up": (CONNECTIONS, lambda port: bombs(port, b"mcp-session-id: made-up\r\n")),
    "own": (CONNECTIONS, own),
    "modern": (
        CONNECTIONS,
        lambda port: bombs(port, b"mcp-protocol-version: 2026-07-28\r\nmcp-method: tools/call\r\nmcp-name: echo\r\n"),
    ),
    "trickle": (TRICKLES, trickle),
    "headers": (CONNECTIONS, endless),
}


async def attack(name: str, port: int) -> None:
    print("ready", flush=True)
    count, stranger = STRANGERS[name]
    await asyncio.gather(*(stranger(port) for _ in range(count)))


@contextlib.contextmanager
def beside(name: str, port: int) -> Iterator[None]:
    """Be attacked for as long as the context lasts."""
    children = [] if name == "alone" else [spawn("bombs.py", "--attack", name, "--port", str(port))]
    try:
        for child in children:
            if child.stdout is not None:
                child.stdout.readline()
        yield
        if any(child.poll() is not None for child in children):
            message = f"the attack {name!r} did not last"
            raise RuntimeError(message)
    finally:
        end(children)


# -- the measurement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """Latencies of the others, and the memory of their node at its end, in MiB."""

    took: list[float]
    resident: float


async def measured(port: int, node: int, seconds: float) -> Round:
    others = [await connected(port) for _ in range(SESSIONS)]
    took: list[float] = []
    await asyncio.sleep(1)
    start = time.perf_counter()
    await asyncio.gather(*(paced(client, start + seconds, took) for client in others))
    return Round(took, resident(node))


def resident(pid: int) -> float:
    """A process's memory in MiB."""
    return int(Path(f"/proc/{pid}/status").read_text("ascii").partition("VmRSS:")[2].split()[0]) / 1024


async def compare(
    given: argparse.Namespace, ports: list[int], nodes: list[subprocess.Popen[str]], url: str
) -> dict[str, list[Round]]:
    for port, node in zip(ports, nodes, strict=True):
        for _ in range(10):  # each for as long as a node takes to start on a machine with nothing else to do
            with contextlib.suppress(TimeoutError):
                await ready(port, node)
                break
    found: dict[str, list[Round]] = {name: [] for name in ("alone", *given.only.split(","))}
    for _ in range(given.rounds):
        for name, rounds in found.items():
            with beside(name, ports[0]):
                rounds.append(await measured(ports[0], nodes[0].pid, given.seconds))
    connection = await asyncpg.connect(url)
    states = [row["state"] for row in await connection.fetch("select state from pgmcp.nodes")]
    await connection.close()
    print(f"nodes afterwards: {', '.join(states)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--only", default=",".join(STRANGERS), help="attacks, with commas between them")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.attack:
        uvloop.run(attack(given.attack, given.port))
        return
    if unknown := set(given.only.split(",")) - set(STRANGERS):
        sys.exit(f"unknown attacks {sorted(unknown)}; there are {', '.join(STRANGERS)}")
    print(machine())
    with postgres() as server:
        ports = [free_port(), free_port()]
        env = {"PGMCP_DATABASE_URL": server.url}
        nodes = [spawn("-m", "pgmcp", "serve", TARGET, "--port", str(port), env=env) for port in ports]
        try:
            found = uvloop.run(compare(given, ports, nodes, server.url))
        finally:
            end(nodes)
    rows = []
    for name, rounds in found.items():
        p50, p99 = ([percentile(each.took, part) * 1000 for each in rounds] for part in (0.5, 0.99))
        calls, resident = sum(len(each.took) for each in rounds), statistics.median(each.resident for each in rounds)
        rows.append([name, str(calls), spread(p50, ".1f"), spread(p99, ".1f"), f"{resident:.0f}"])
    print(f"\n{given.rounds} rounds of {given.seconds} s: median (least to most) of the rounds\n")
    table(["beside", "calls", "p50 ms", "p99 ms", "node's memory MiB"], rows)


if __name__ == "__main__":
    main()
