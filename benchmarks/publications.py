"""Publications: how soon they are heard, whether all are, and what a thousand listeners cost.

Three pgmcp nodes serve this file's own server, whose tool ``publish`` publishes. Everybody who listens lives in this
process: ``subscriptions/listen`` streams of 2026-07-28, and GET streams of sessions of 2025-11-25 whose exchanges go to
other nodes than their owner.

    latency   one listen stream and one session's stream at each node hear a publication of one resource after the
              other, made in turns by a tool on each node and by SQL; from right before the call to the last byte
    steady    10,000 publications of as many resources, by all nodes at once; each listen stream must hear each once
    fan-out   1,000 listen streams, on one node and on three, then the streams of 1,000 sessions on three, hear
              publications; from right before the call to the first, the median and the last stream, and how long small
              calls to a node that carries them take meanwhile

    python benchmarks/publications.py [--count 10000] [--streams 1000] [--only latency,steady,fan-out]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from calls import Client
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import EmptyResult, SubscribeRequestParams
from measure import ROOT, end, machine, percentile, postgres, spawn, table

from pgmcp.embedded import free_port

NODES = 3
SOME = 400  # publications whose latency is measured
EVERY = 0.05  # seconds between two of them
FANNED = {"listen": 20, "session": 5}  # publications
LIMIT = 900.0  # seconds that all of it may take
QUIET = 30.0  # seconds after which what was not heard counts as lost
VERSION = "2026-07-28"
SQL = "select pgmcp.publish_resource_updated($1)"

mcp = MCPServer("publications", log_level="WARNING")


@mcp.tool()
async def publish(first: int, count: int, ctx: Context) -> None:
    """Publish updates of resources, one after the other."""
    for number in range(first, first + count):
        await ctx.notify_resource_updated(f"bench://{number}")


@mcp.tool()
def nothing() -> str:
    """Do nothing."""
    return ""


async def subscribed(_: object, __: SubscribeRequestParams) -> EmptyResult:
    return EmptyResult()


mcp._lowlevel_server.add_request_handler("resources/subscribe", SubscribeRequestParams, subscribed)  # noqa: SLF001


# -- who listens and who publishes -------------------------------------------------------------------------------------


class Modern:
    """Requests of 2026-07-28 over one connection."""

    ids = itertools.count(1)

    def __init__(self, port: int) -> None:
        self._port = port

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)

    def send(self, method: str, params: dict[str, Any], name: str = "") -> None:
        meta: dict[str, Any] = {f"io.modelcontextprotocol/{key}": value for key, value in
                (("protocolVersion", VERSION), ("clientCapabilities", {}))}  # fmt: skip
        message = {"jsonrpc": "2.0", "id": next(self.ids), "method": method, "params": {**params, "_meta": meta}}
        body = json.dumps(message).encode()
        named = f"mcp-name: {name}\r\n" if name else ""
        self._writer.write(
            f"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\naccept: application/json, text/event-stream\r\n"
            f"content-type: application/json\r\nmcp-protocol-version: {VERSION}\r\nmcp-method: {method}\r\n{named}"
            f"content-length: {len(body)}\r\n\r\n".encode() + body
        )  # fmt: skip

    async def tool(self, name: str, **arguments: object) -> None:
        """Call a tool and wait for the end of its answer."""
        self.send("tools/call", {"name": name, "arguments": arguments}, name)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head[:20]:
            raise RuntimeError(head.decode())
        if b"transfer-encoding: chunked" in head:
            await self._reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            await self._reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))

    async def listen(self, uris: Sequence[str], hear: Callable[[int], None]) -> None:
        """Open a stream, return when it is acknowledged, and call ``hear`` with the number of each resource."""
        self.send("subscriptions/listen", {"notifications": {"resourceSubscriptions": uris}})
        while b"acknowledged" not in await self._reader.readline():
            pass
        LISTENING.append((asyncio.create_task(hearing(self._reader, hear)), self._writer))


LISTENING: list[tuple[asyncio.Task[None], asyncio.StreamWriter]] = []


async def hang_up() -> None:
    """Nobody listens any more."""
    for task, writer in LISTENING:
        task.cancel()
        writer.close()
    await asyncio.gather(*(task for task, _ in LISTENING), return_exceptions=True)
    LISTENING.clear()


async def hearing(reader: asyncio.StreamReader, hear: Callable[[int], None]) -> None:
    while line := await reader.readline():
        _, found, rest = line.partition(b'"bench://')
        if found and line.startswith(b"data:"):
            hear(int(rest.partition(b'"')[0]))


async def session_at(owner: int, edge: int, uris: Sequence[str], hear: Callable[[int], None]) -> None:
    """A session that lives on the node of one port and fetches its standalone stream over another."""
    client = Client(owner)
    await client.connect()
    for number, uri in enumerate(uris, 1):
        await client._post(  # noqa: SLF001
            {"jsonrpc": "2.0", "id": number, "method": "resources/subscribe", "params": {"uri": uri}}
        )
    reader, writer = await asyncio.open_connection("127.0.0.1", edge)
    accept, version = b"accept: text/event-stream\r\n", b"mcp-protocol-version: 2025-11-25\r\n"
    writer.write(b"GET /mcp HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n%s%s%s\r\n" % (edge, accept, version, client._session))  # noqa: SLF001
    await reader.readuntil(b"\r\n\r\n")
    LISTENING.append((asyncio.create_task(hearing(reader, hear)), writer))


async def until(condition: Callable[[], bool]) -> bool:
    """Whether it came to hold before nothing happened for long."""
    end_at = time.perf_counter() + QUIET
    while not condition() and time.perf_counter() < end_at:  # noqa: ASYNC110 - it is a sum over many listeners
        await asyncio.sleep(0.005)
    return condition()


# -- the measurements --------------------------------------------------------------------------------------------------


def milliseconds(took: Sequence[float]) -> list[str]:
    return [f"{1000 * percentile(took, part):.1f}" for part in (0.5, 0.99, 1.0)]


async def latency(ports: Sequence[int], database: str) -> None:
    uris = [f"bench://{number}" for number in range(SOME)]
    begun: dict[int, float] = {}
    took: dict[str, list[float]] = {"listen": [], "session": []}

    def ear(era: str) -> Callable[[int], None]:
        return lambda number: took[era].append(time.perf_counter() - begun[number])

    for place, port in enumerate(ports):
        stream = Modern(port)
        await stream.connect()
        await stream.listen(uris, ear("listen"))
        await session_at(port, ports[(place + 1) % NODES], uris, ear("session"))
    callers = [Modern(port) for port in ports]
    for caller in callers:
        await caller.connect()
    hand = await asyncpg.connect(database)
    for number in range(SOME):
        await asyncio.sleep(EVERY)
        begun[number] = time.perf_counter()
        if number % (NODES + 1) < NODES:
            await callers[number % (NODES + 1)].tool("publish", first=number, count=1)
        else:
            await hand.execute(SQL, uris[number])
    await until(lambda: all(len(found) >= SOME * NODES for found in took.values()))
    rows = [
        [f"{era} streams, {NODES} nodes", str(len(found)), str(SOME * NODES - len(found)), *milliseconds(found)]
        for era, found in took.items()
    ]
    print(f"\nOne publication every {1000 * EVERY:.0f} ms, by a tool on each node and by SQL in turns:\n")
    table(["heard on", "heard", "lost", "p50 ms", "p99 ms", "max ms"], rows)
    await hand.close()


async def steady(ports: Sequence[int], count: int) -> None:
    uris = [f"bench://{number}" for number in range(count)]
    heard: list[Counter[int]] = [Counter() for _ in ports]
    streams = [Modern(port) for port in ports]
    for stream, counter in zip(streams, heard, strict=True):
        await stream.connect()
        await stream.listen(uris, lambda number, counter=counter: counter.update((number,)))  # type: ignore[misc]
    callers = [Modern(port) for port in ports for _ in range(2)]
    for caller in callers:
        await caller.connect()
    bounds = [count * place // len(callers) for place in range(len(callers) + 1)]
    begun = time.perf_counter()
    await asyncio.gather(
        *(
            caller.tool("publish", first=first, count=last - first)
            for caller, first, last in zip(callers, bounds, bounds[1:], strict=False)
        )
    )
    published = time.perf_counter() - begun
    await until(lambda: all(len(counter) == count for counter in heard))
    took = time.perf_counter() - begun
    lost = [count - len(counter) for counter in heard]
    twice = [sum(counter.values()) - len(counter) for counter in heard]
    print(
        f"\n{count} publications by {len(callers)} callers on {NODES} nodes: published in {published:.1f} s "
        f"({count / published:.0f}/s), heard by all in {took:.1f} s; lost {lost}, twice {twice}"
    )


async def fan_out(ports: Sequence[int], count: int, kind: str, *, spread: bool) -> None:
    published = FANNED[kind]
    uris = [f"bench://{number}" for number in range(published)]
    heard: list[list[float]] = [[] for _ in range(published)]

    def hear(number: int) -> None:
        heard[number].append(time.perf_counter())

    for number in range(count):
        port = ports[number % NODES if spread else 0]
        if kind == "listen":
            stream = Modern(port)
            await stream.connect()
            await stream.listen(uris, hear)
        else:
            await session_at(port, port, uris, hear)
    caller, prober = Modern(ports[1]), Modern(ports[0])
    await caller.connect()
    await prober.connect()
    calm, busy = await probed(prober, 2.0), []
    firsts, medians, lasts = [], [], []
    for number in range(published):
        begun = time.perf_counter()
        probing = asyncio.create_task(probed(prober, 2.0))
        await caller.tool("publish", first=number, count=1)
        await until(lambda number=number: len(heard[number]) == count)  # type: ignore[misc]
        busy += await probing
        took = [at - begun for at in heard[number]]
        firsts.append(took[0])
        medians.append(statistics.median(took))
        lasts.append(took[-1])
    lost = sum(count - len(found) for found in heard)
    where = f"{NODES} nodes" if spread else "one node"
    print(f"\n{count} {kind} streams on {where}, {published} publications: lost {lost}\n")
    rows = [[name, *milliseconds(found)] for name, found in
            (("first stream", firsts), ("median stream", medians), ("last stream", lasts),
             ("a small call, before", calm), ("a small call, meanwhile", busy))]  # fmt: skip
    table(["", "p50 ms", "p99 ms", "max ms"], rows)


async def probed(prober: Modern, seconds: float) -> list[float]:
    """How long small calls take; a pause after each leaves the node to those that are measured."""
    took, end_at = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end_at:
        await prober.tool("nothing")
        took.append(time.perf_counter() - begun)
        await asyncio.sleep(0.02)
    return took


async def ready(port: int, node: subprocess.Popen[str]) -> None:
    async with asyncio.timeout(20):
        while node.poll() is None:
            with contextlib.suppress(OSError, RuntimeError):
                await Client(port).connect()
                return
            await asyncio.sleep(0.1)
    message = "a node did not start"
    raise RuntimeError(message)


async def run(given: argparse.Namespace, database: str, ports: Sequence[int], nodes: Sequence[Any]) -> None:
    async with asyncio.timeout(LIMIT):
        for port, node in zip(ports, nodes, strict=True):
            await ready(port, node)
        only = given.only.split(",")
        if "latency" in only:
            await latency(ports, database)
            await hang_up()
        if "steady" in only:
            await steady(ports, given.count)
            await hang_up()
        if "fan-out" in only:
            for kind, spread in (("listen", False), ("listen", True), ("session", True)):
                await fan_out(ports, given.streams, kind, spread=spread)
                await hang_up()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=1_000)
    parser.add_argument("--only", default="latency,steady,fan-out", help="measurements, with commas between them")
    given = parser.parse_args()
    print(machine())
    with postgres() as server:
        ports = [free_port() for _ in range(NODES)]
        paths = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))  # the nodes load this file, which loads others
        env = {"PGMCP_DATABASE_URL": server.url, "PYTHONPATH": paths, "PGMCP_DRAIN_NOTICE": "0"}
        most = str(4 * given.streams)  # all come from one address
        env |= {"PGMCP_INITIALIZE_RATE": "0", "PGMCP_MAX_LISTENS": most, "PGMCP_MAX_SESSIONS_PER_CALLER": most}
        target = f"{Path(__file__).resolve()}:mcp"
        nodes = [
            spawn("-m", "pgmcp", "serve", target, "--port", str(port), "--node-name", f"n{place}", env=env)
            for place, port in enumerate(ports, 1)
        ]
        try:
            uvloop.run(run(given, server.url, ports, nodes))
        finally:
            end(nodes)


if __name__ == "__main__":
    main()
