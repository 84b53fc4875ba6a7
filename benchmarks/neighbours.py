"""What the others feel of bad neighbours: one session that floods, one slow reader, one call of ten seconds.

One pgmcp node serves this file's own server. Eight sessions call a tool at a steady pace, from a schedule, so that a
call that had to wait for the one before it counts its wait. Their latencies are measured alone and beside the
neighbours, in turns, so that noise of the machine falls on both. Each neighbour is a process of its own, so that the
event loop of the measured callers is not what is measured; callers, neighbours, nodes and PostgreSQL still share the
machine's cores.

    flood          one session with 50 connections, each of which calls without a pause
    slow reader    calls whose answer has 6 MB (more than sockets take), none of which is read; renewed when the node
                   has given it up
    long call      a call of ten seconds, always one

With ``--nodes 2`` the neighbours come over a second node: their sessions live on the node of the others, their
exchanges arrive on the other one.

    python benchmarks/neighbours.py [--rounds 2] [--seconds 2] [--only flood,slow,long] [--nodes 1]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from calls import Client
from mcp.server.mcpserver import MCPServer
from measure import ROOT, core_time, end, machine, percentile, postgres, spawn, spread, table

from pgmcp.embedded import free_port

SESSIONS = 8
EVERY = 0.05  # seconds between two calls of one session
FLOOD = 50
LIMIT = 300.0  # seconds that all of it may take

mcp = MCPServer("neighbours", log_level="WARNING")


@mcp.tool()
def echo(text: str) -> str:
    return text


@mcp.tool(structured_output=False)
def much(size: int) -> str:
    return "x" * size


@mcp.tool()
async def wait(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "waited"


def tool(name: str, request_id: object, **arguments: object) -> dict[str, Any]:
    params = {"name": name, "arguments": arguments}
    return {"jsonrpc": "2.0", "id": request_id, "method": "tools/call", "params": params}


async def connected(port: int) -> Client:
    client = Client(port)
    await client.connect()
    return client


async def paced(client: Client, until: float, took: list[float]) -> None:
    """Call from a schedule; what a late call costs the next one counts."""
    due = time.perf_counter()
    while (due := due + EVERY) < until and time.perf_counter() < until:
        await asyncio.sleep(due - time.perf_counter())
        await client.call()
        took.append(time.perf_counter() - due)


# -- the neighbours (processes of their own) ---------------------------------------------------------------------------


async def abroad(owner: int, edge: int) -> Client:
    """A session that lives on the node of one port, spoken to over another."""
    client = await connected(owner)
    await reconnect(client, edge)
    return client


async def reconnect(client: Client, port: int) -> None:
    client._reader, client._writer = await asyncio.open_connection("127.0.0.1", port)  # noqa: SLF001


async def flood(owner: int, edge: int) -> None:
    first = await connected(owner)

    async def one(number: int) -> None:
        client = Client(edge)
        client._session, client._count = first._session, number * 1_000_000  # noqa: SLF001
        await reconnect(client, edge)
        while True:
            with contextlib.suppress(RuntimeError):  # 429: it has more streams open than it may
                await client.call()

    await asyncio.gather(*(one(number) for number in range(1, FLOOD + 1)))


async def slow_reader(owner: int, edge: int) -> None:
    client, loop = await connected(owner), asyncio.get_running_loop()
    for number in range(1_000_000):
        body = json.dumps(tool("much", f"m{number}", size=6_000_000)).encode()
        accept = b"accept: application/json, text/event-stream\r\ncontent-type: application/json\r\n"
        head = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\n%scontent-length: %d\r\n%s\r\n"
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            await loop.sock_connect(deaf, ("127.0.0.1", edge))
            await loop.sock_sendall(deaf, head % (accept, len(body), client._session) + body)  # noqa: SLF001
            await asyncio.sleep(3)  # longer than the node's write timeout


async def long_call(owner: int, edge: int) -> None:
    client = await abroad(owner, edge)
    for number in range(1_000_000):
        await client._post(tool("wait", f"w{number}", seconds=10))  # noqa: SLF001


NEIGHBOURS: dict[str, Callable[[int, int], Awaitable[None]]] = {"flood": flood, "slow": slow_reader, "long": long_call}


async def neighbour(name: str, ports: Sequence[int]) -> None:
    print("ready", flush=True)
    await NEIGHBOURS[name](ports[0], ports[-1])


@contextlib.contextmanager
def beside(names: Sequence[str], ports: Sequence[int]) -> Iterator[None]:
    """Have neighbours for as long as the context lasts."""
    given = ("--ports", ",".join(map(str, ports)))
    children = {name: spawn("neighbours.py", "--neighbour", name, *given) for name in names}
    try:
        for child in children.values():
            if child.stdout is not None:
                child.stdout.readline()
        yield
        for name, child in children.items():
            if child.poll() is not None:
                message = f"the neighbour {name!r} did not last"
                raise RuntimeError(message)
    finally:
        end(list(children.values()))


# -- the measurement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """Latencies of the others, and the shares of the time in which their node had a core or waited for one."""

    took: list[float]
    had_core: float
    waited: float


async def measured(port: int, node: int, seconds: float) -> Round:
    """Measure the others, after a second in which the neighbours settle."""
    others = [await connected(port) for _ in range(SESSIONS)]
    took: list[float] = []
    await asyncio.sleep(1)
    start, before = time.perf_counter(), core_time(node)
    await asyncio.gather(*(paced(client, start + seconds, took) for client in others))
    had, waited = (after - first for after, first in zip(core_time(node), before, strict=True))
    elapsed = time.perf_counter() - start
    return Round(took, had / elapsed, waited / elapsed)


async def compare(
    ports: Sequence[int], node: int, rounds: int, seconds: float, names: Sequence[str]
) -> dict[str, list[Round]]:
    cases = {"alone": (), **{name: (name,) for name in names}, **({"all": tuple(names)} if len(names) > 1 else {})}
    took: dict[str, list[Round]] = {case: [] for case in cases}
    async with asyncio.timeout(LIMIT):
        for _ in range(rounds):
            for case, neighbours in cases.items():
                with beside(neighbours, ports):
                    took[case].append(await measured(ports[0], node, seconds))
    return took


async def ready(port: int, node: subprocess.Popen[str]) -> None:
    async with asyncio.timeout(10):
        while node.poll() is None:
            with contextlib.suppress(OSError, RuntimeError):
                await connected(port)
                return
            await asyncio.sleep(0.1)
    message = "the node did not start"
    raise RuntimeError(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", default=",".join(NEIGHBOURS), help="neighbours, with commas between them")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--neighbour", help=argparse.SUPPRESS)
    parser.add_argument("--ports", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.neighbour:
        uvloop.run(neighbour(given.neighbour, [int(port) for port in given.ports.split(",")]))
        return
    names = given.only.split(",")
    if unknown := set(names) - set(NEIGHBOURS):
        sys.exit(f"unknown neighbours {sorted(unknown)}; there are {', '.join(NEIGHBOURS)}")
    print(machine())
    with postgres() as server:
        ports = [free_port() for _ in range(given.nodes)]
        paths = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))  # the node loads this file, which loads others
        env = {"PGMCP_DATABASE_URL": server.url, "PGMCP_WRITE_TIMEOUT": "2", "PYTHONPATH": paths}
        target = f"{Path(__file__).resolve()}:mcp"
        nodes = [spawn("-m", "pgmcp", "serve", target, "--port", str(port), env=env) for port in ports]
        try:

            async def run() -> dict[str, list[Round]]:
                for port, node in zip(ports, nodes, strict=True):
                    await ready(port, node)
                return await compare(ports, nodes[0].pid, given.rounds, given.seconds, names)

            took = uvloop.run(run())
        finally:
            end(nodes)
    alone = statistics.median(percentile(each.took, 0.99) for each in took["alone"])
    rows = []
    for case, found in took.items():
        p50, p99 = ([percentile(each.took, part) * 1000 for each in found] for part in (0.5, 0.99))
        cores = [f"{100 * statistics.median(values):.0f}" for values in
                 ([each.had_core for each in found], [each.waited for each in found])]  # fmt: skip
        calls, ratio = sum(len(each.took) for each in found), statistics.median(p99) / 1000 / alone
        rows.append([case, str(calls), spread(p50, ".1f"), spread(p99, ".1f"), f"{ratio:.1f}", *cores])
    print(
        f"\n{given.rounds} rounds of {given.seconds} s on {given.nodes} node(s): median (least to most) of the rounds\n"
    )
    table(["beside", "calls", "p50 ms", "p99 ms", "p99 / alone", "node on a core %", "waits for one %"], rows)


if __name__ == "__main__":
    main()
