"""Calls per second and CPU per call: one pgmcp node against the SDK's own server, same target, same machine.

Both serve ``echo.py`` under uvicorn, uvloop and httptools. A third process sends ``tools/call`` over keep-alive
connections, each with a session of its own, one call at a time. Rounds alternate between the servers, so that noise of
the machine falls on all of them. CPU is user + system of the server process; PostgreSQL's is counted apart.

    python benchmarks/calls.py [--rounds 3] [--seconds 2] [--sessions 1,8] [--responses sse,json] [--nodes 1]
    python benchmarks/calls.py --profile [--responses json]

``--profile`` samples the node's Python stack every millisecond of its CPU time, instead of comparing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop
from measure import ROOT, cpu, end, family_cpu, machine, percentile, postgres, spawn, spread, table

from pgmcp.embedded import free_port

VERSION = "2025-11-25"
WARM_UP = 30  # calls of each session before the measurement
SAMPLE = 0.001  # seconds of CPU between two samples of the profile
Served = tuple[subprocess.Popen[str], int]
TARGET = f"{Path(__file__).parent / 'echo.py'}:mcp"


# -- the load generator (a process of its own) -------------------------------------------------------------------------


class Client:
    """One MCP session over one keep-alive connection; only as much HTTP as these servers speak."""

    def __init__(self, port: int) -> None:
        self._port, self._session, self._count = port, b"", 0

    async def connect(self) -> None:
        """Connect and do the handshake."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        client = {"name": "bench", "version": "1"}
        params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}
        head, body = await self._post({"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
        _, found, rest = head.lower().partition(b"mcp-session-id:")
        if not found:
            message = f"no session: {head!r} {body!r}"
            raise RuntimeError(message)
        self._session = b"mcp-session-id: " + rest.split(b"\r\n")[0].strip() + b"\r\n"
        await self._post({"jsonrpc": "2.0", "method": "notifications/initialized"})

    async def move(self, port: int) -> None:
        """Go on over another node."""
        self._writer.close()
        self._port = port
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)

    async def call(self) -> float:
        """Call the tool; seconds until the whole answer was there."""
        self._count += 1
        text = f"hello {self._count}"
        params = {"name": "echo", "arguments": {"text": text}}
        message = {"jsonrpc": "2.0", "id": self._count, "method": "tools/call", "params": params}
        start = time.perf_counter()
        head, body = await self._post(message)
        took = time.perf_counter() - start
        if b" 200 " not in head[:20] or text.encode() not in body:
            error = f"wrong answer: {head!r} {body!r}"
            raise RuntimeError(error)
        return took

    async def _post(self, message: dict[str, Any]) -> tuple[bytes, bytes]:
        body = json.dumps(message, separators=(",", ":")).encode()
        self._writer.write(
            b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1:%d\r\naccept: application/json, text/event-stream\r\n"
            b"content-type: application/json\r\nuser-agent: bench\r\nmcp-protocol-version: %s\r\n%s"
            b"content-length: %d\r\n\r\n%s" % (self._port, VERSION.encode(), self._session, len(body), body)
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if b"transfer-encoding: chunked" in head:
            return head, await self._reader.readuntil(b"\r\n0\r\n\r\n")
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        return head, await self._reader.readexactly(length)


async def load(ports: list[int], sessions: int, seconds: float) -> None:
    """Open sessions, say ``ready``, wait for a line, call for a while, print the latencies."""
    clients = [Client(ports[number % len(ports)]) for number in range(sessions)]
    for client in clients:
        await client.connect()
    await asyncio.gather(*(_repeat(client, WARM_UP) for client in clients))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    start = time.perf_counter()
    took = await asyncio.gather(*(_until(client, start + seconds) for client in clients))
    elapsed = time.perf_counter() - start
    print(json.dumps({"elapsed": elapsed, "took": [value for values in took for value in values]}), flush=True)


async def _repeat(client: Client, times: int) -> None:
    for _ in range(times):
        await client.call()


async def _until(client: Client, end_at: float) -> list[float]:
    took = []
    while time.perf_counter() < end_at:
        took.append(await client.call())
    return took


# -- the comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """One measuring run."""

    took: list[float]
    rate: float
    cpu: float
    database: float


def measure(server: subprocess.Popen[str], port: int, database: int, sessions: int, seconds: float) -> Result:
    """Load one server."""
    generator = spawn("calls.py", "--load", str(port), "--sessions", str(sessions), "--seconds", str(seconds))
    try:
        ready, stdin = _line(generator), generator.stdin
        if ready != "ready" or stdin is None:
            message = f"the load generator ended early: {ready!r}"
            raise RuntimeError(message)
        before = cpu(server.pid), family_cpu(database)
        stdin.write("go\n")
        stdin.flush()
        found = json.loads(_line(generator))
        after = cpu(server.pid), family_cpu(database)
    finally:
        end([generator])
    calls = len(found["took"])
    return Result(
        found["took"], calls / found["elapsed"], (after[0] - before[0]) / calls, (after[1] - before[1]) / calls
    )


def _line(child: subprocess.Popen[str]) -> str:
    return child.stdout.readline().strip() if child.stdout is not None else ""


@contextmanager
def serving(name: str, response: str, url: str, *, profiled: bool = False) -> Iterator[Served]:
    """Run one server until the block ends."""
    port = free_port()
    env = {"PGMCP_DATABASE_URL": url}
    if name == "sdk":
        child = spawn("echo.py", "--port", str(port), "--response", response)
    elif profiled:
        child = spawn("calls.py", "--sampled", str(port), "--responses", response, env=env)
    else:
        child = spawn("-m", "pgmcp", "serve", TARGET, "--port", str(port), "--response", response, env=env)
    try:
        _await_port(child, port, "/readyz" if name != "sdk" else "/mcp")
        yield child, port
    finally:
        end([child])


def _await_port(child: subprocess.Popen[str], port: int, path: str) -> None:
    deadline = time.monotonic() + 30.0
    while child.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1.0).close()
        except urllib.error.HTTPError as answer:
            if answer.code < 500:
                return
        except OSError:
            pass
        else:
            return
        time.sleep(0.05)
    message = f"the server did not come up (exit code {child.poll()})"
    raise RuntimeError(message)


def compare(given: argparse.Namespace) -> None:
    """Alternate between the servers and print a table for each kind of answer."""
    print(machine())
    with postgres() as database:
        for response in given.responses.split(","):
            found: dict[tuple[str, int], list[Result]] = defaultdict(list)
            with serving("pgmcp", response, database.url) as node, serving("sdk", response, database.url) as plain:
                for _ in range(given.rounds):
                    for sessions in given.sessions:
                        for name, (child, port) in (("sdk", plain), ("pgmcp", node)):
                            result = measure(child, port, database.pid, sessions, given.seconds)
                            found[name, sessions].append(result)
            print(f"\n{response}, {given.rounds} rounds of {given.seconds} s: median (least to most) of the rounds\n")
            head = ("server", "sessions", "calls/s", "p50 ms", "p95 ms", "p99 ms", "CPU µs/call", "PostgreSQL µs/call")
            table(head, [_row(name, sessions, results) for (name, sessions), results in found.items()])


def _row(name: str, sessions: int, results: list[Result]) -> list[str]:
    parts = [spread([percentile(result.took, part) * 1000 for result in results], ".2f") for part in (0.5, 0.95, 0.99)]
    rate = spread([result.rate for result in results], ".0f")
    own = spread([result.cpu * 1e6 for result in results], ".0f")
    stored = spread([result.database * 1e6 for result in results], ".0f") if name != "sdk" else "-"
    return [name, str(sessions), rate, *parts, own, stored]


# -- the profile -------------------------------------------------------------------------------------------------------


class Sampler:
    """Counts where the main thread is, every millisecond of its CPU time (C functions count for their callers)."""

    def __init__(self) -> None:
        self.samples = 0
        self.own: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def start(self) -> None:
        """Sample from now on."""
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE, SAMPLE)

    def _sample(self, _signum: int, frame: FrameType | None) -> None:
        self.samples += 1
        seen: set[str] = set()
        while frame is not None:
            name = f"{_package(frame.f_code.co_filename)} {frame.f_code.co_qualname}"
            if not seen:
                self.own[name] += 1
                self.places[name.partition(" ")[0].split("/")[0]] += 1
            seen.add(name)
            frame = frame.f_back
        self.whole.update(seen)

    def report(self) -> None:
        """Print packages, functions by own time and functions by time with all that they call."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        for title, counts, limit in (
            ("own time by package", self.places, 16),
            ("own time by function", self.own, 40),
            ("time with callees", self.whole, 70),
        ):
            print(f"\n{title} ({self.samples} samples)", file=sys.stderr)
            for name, count in counts.most_common(limit):
                print(f"{100 * count / self.samples:6.1f} %  {name}", file=sys.stderr)


def _package(filename: str) -> str:
    """A file's name from its package on."""
    path = Path(filename)
    parts = path.parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    return f"python/{path.name}"


def sampled(port: int, response: str) -> None:
    """Run a node under the sampler; SIGUSR1 starts it, SIGUSR2 reports."""
    from pgmcp.node import serve  # noqa: PLC0415 - only this process is a node
    from pgmcp.settings import Settings  # noqa: PLC0415

    sampler = Sampler()
    signal.signal(signal.SIGUSR1, lambda *_: sampler.start())
    signal.signal(signal.SIGUSR2, lambda *_: sampler.report())
    serve(Settings(port=port, response=response), TARGET)


def profile(given: argparse.Namespace) -> None:
    """Load a sampled node and have it report."""
    with postgres() as database:
        for response in given.responses.split(","):
            for sessions in given.sessions:
                with serving("pgmcp", response, database.url, profiled=True) as (child, port):
                    print(f"\n== {response}, {sessions} sessions", file=sys.stderr, flush=True)
                    measure(child, port, database.pid, sessions, 0.5)
                    child.send_signal(signal.SIGUSR1)
                    measure(child, port, database.pid, sessions, given.seconds)
                    child.send_signal(signal.SIGUSR2)
                    time.sleep(0.5)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measuring run")
    parser.add_argument("--sessions", type=lambda text: [int(word) for word in text.split(",")], default=[1, 8])
    parser.add_argument("--responses", default="sse,json")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sampled", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        uvloop.run(load([given.load], given.sessions[0], given.seconds))
    elif given.sampled:
        sampled(given.sampled, given.responses)
    elif given.profile:
        profile(given)
    else:
        compare(given)


if __name__ == "__main__":
    main()
