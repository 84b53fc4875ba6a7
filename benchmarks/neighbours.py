"""What the others feel of bad neighbours: one session that floods, one slow reader, one call of ten seconds.

One pgmcp node serves this file's own server. Eight sessions call a tool at a steady pace, from a schedule, so that a
call that had to wait for the one before it counts its wait. Their latencies are measured alone and beside the
neighbours, in turns, so that noise of the machine falls on both.

    flood          one session with 50 connections, each of which calls without a pause
    slow reader    calls whose answer has 12 MB, none of which is read; renewed when the node has given it up
    long call      a call of ten seconds, always one

    python benchmarks/neighbours.py [--rounds 2] [--seconds 2] [--only flood,slow,long]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop
from calls import Client
from mcp.server.mcpserver import MCPServer
from measure import ROOT, end, machine, percentile, postgres, spawn, table

from pgmcp.embedded import free_port

SESSIONS = 8
EVERY = 0.05  # seconds between two calls of one session
FLOOD = 50
LIMIT = 60.0  # seconds that all of it may take

mcp = MCPServer("neighbours", log_level="WARNING")


@mcp.tool()
def echo(text: str) -> str:
    return text


@mcp.tool()
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


# -- the neighbours ----------------------------------------------------------------------------------------------------


async def flood(port: int) -> None:
    first = await connected(port)

    async def one(number: int) -> None:
        client = Client(port)
        client._reader, client._writer = await asyncio.open_connection("127.0.0.1", port)  # noqa: SLF001
        client._session, client._count = first._session, number * 1_000_000  # noqa: SLF001
        while True:
            await client.call()

    await asyncio.gather(*(one(number) for number in range(1, FLOOD + 1)))


async def slow_reader(port: int) -> None:
    client, loop = await connected(port), asyncio.get_running_loop()
    for number in range(1_000_000):
        body = json.dumps(tool("much", f"m{number}", size=12_000_000)).encode()
        accept = b"accept: application/json, text/event-stream\r\ncontent-type: application/json\r\n"
        head = b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\n%scontent-length: %d\r\n%s\r\n"
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            await loop.sock_connect(deaf, ("127.0.0.1", port))
            await loop.sock_sendall(deaf, head % (accept, len(body), client._session) + body)  # noqa: SLF001
            await asyncio.sleep(3)  # longer than the node's write timeout


async def long_call(port: int) -> None:
    client = await connected(port)
    for number in range(1_000_000):
        await client._post(tool("wait", f"w{number}", seconds=10))  # noqa: SLF001


NEIGHBOURS: dict[str, Callable[[int], Awaitable[None]]] = {"flood": flood, "slow": slow_reader, "long": long_call}


# -- the measurement ---------------------------------------------------------------------------------------------------


async def measured(port: int, seconds: float, neighbours: Sequence[str]) -> list[float]:
    """Latencies of the others; neighbours start a second earlier."""
    others = [await connected(port) for _ in range(SESSIONS)]
    took: list[float] = []
    tasks = [asyncio.ensure_future(NEIGHBOURS[name](port)) for name in neighbours]
    await asyncio.sleep(1 if tasks else 0.2)
    until = time.perf_counter() + seconds
    await asyncio.gather(*(paced(client, until, took) for client in others))
    for name, task in zip(neighbours, tasks, strict=True):
        if task.done():
            message = f"the neighbour {name!r} did not last: {task.exception()!r}"
            raise RuntimeError(message)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return took


async def compare(port: int, rounds: int, seconds: float, names: Sequence[str]) -> dict[str, list[float]]:
    cases = {"alone": (), **{name: (name,) for name in names}, **({"all": tuple(names)} if len(names) > 1 else {})}
    took: dict[str, list[float]] = {case: [] for case in cases}
    async with asyncio.timeout(LIMIT - 10):
        for _ in range(rounds):
            for case, neighbours in cases.items():
                took[case] += await measured(port, seconds, neighbours)
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
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(NEIGHBOURS):
        sys.exit(f"unknown neighbours {sorted(unknown)}; there are {', '.join(NEIGHBOURS)}")
    print(machine())
    with postgres() as server:
        port = free_port()
        paths = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))  # the node loads this file, which loads others
        env = {"PGMCP_DATABASE_URL": server.url, "PGMCP_WRITE_TIMEOUT": "2", "PYTHONPATH": paths}
        node = spawn("-m", "pgmcp", "serve", f"{Path(__file__).resolve()}:mcp", "--port", str(port), env=env)
        try:

            async def run() -> dict[str, list[float]]:
                await ready(port, node)
                return await compare(port, given.rounds, given.seconds, names)

            took = uvloop.run(run())
        finally:
            end([node])
    alone = percentile(took["alone"], 0.99)
    rows = [
        [case, str(len(values)), *(f"{percentile(values, part) * 1000:.1f}" for part in (0.5, 0.99)),
         f"{percentile(values, 0.99) / alone:.1f}"]
        for case, values in took.items()
    ]  # fmt: skip
    table(["beside", "calls", "p50 ms", "p99 ms", "p99 / alone"], rows)


if __name__ == "__main__":
    main()
