"""What it costs that the edge is not the owner, for each kind of wake-up of design section 5.

Three node processes on one durable PostgreSQL run the real thing: endpoint (``PostHandler``), inbox, log, wake-ups,
line, host and actor of pgmcp, with its own statements. Left out: HTTP and the MCP server. Busy loops imitate them,
of ``HTTP_WORK`` at the edge and ``SERVER_WORK`` at the owner. This process is the client: it sends each session's calls
one after another over unix sockets and chooses the edge of each. A call is over when its answer would go to the client.

The variants are small differences around the real code: a changed statement text, another ``Notifier``.

    tick             wake-ups wait for a timer of 10 ms; the claim is flushed (fsync)
    separate-flush   NOTIFY in a statement of its own, at once; the claim is flushed
    separate         the same, and the claim commits asynchronously: what pgmcp does
    write-flush      NOTIFY inside the statements ``accept`` and ``append``; the claim is flushed
    write            the same, and the claim commits asynchronously
    direct-flush     ids straight to the peer over a socket, acknowledged; the claim is flushed
    direct           the same, and the claim commits asynchronously

    python benchmarks/hop.py [--rounds 3] [--seconds 3] [--variants separate,direct]

Rounds alternate between variants in the same processes, and one session's calls alternate between the edges every few
calls, so that noise of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import uvloop
from measure import end, machine, percentile, postgres, spawn, spread, table
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from pgmcp.clock import Clock, Ids
from pgmcp.errors import DatabaseUnavailable
from pgmcp.node import incarnation
from pgmcp.service import Faults
from pgmcp.session.adapter import Conversation, Kind, Outgoing, Shared
from pgmcp.session.sdk.bus import PostgresSubscriptionBus
from pgmcp.session.state import Hooks
from pgmcp.settings import Settings
from pgmcp.store import database, statements
from pgmcp.store.encryption.key_rings import CONTEXTS, KeyRing
from pgmcp.store.encryption.key_wrapping import KeyWrapping
from pgmcp.store.encryption.payloads import Payloads
from pgmcp.store.notifier import TableNotifier
from pgmcp.store.publications import TablePublications
from pgmcp.store.schema.revisions import head
from pgmcp.types import ANONYMOUS, NewSession, NodeId, StreamId
from pgmcp.web.admission import Admission
from pgmcp.web.bodies import Bodies
from pgmcp.web.connection import Connection
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.post_handler import PostHandler

VARIANTS = ("tick", "separate-flush", "separate", "write-flush", "write", "direct-flush", "direct")
PLACES = ("edge = owner", "edge ≠ owner", "round robin")
NODES = 3
SESSIONS = 8
HTTP_WORK = 150e-6  # seconds of CPU: uvicorn and routing
SERVER_WORK = 100e-6  # seconds of CPU: the SDK's low-level server (reference: 88-100 µs)
TICK = 0.010
DEADLINE = 2.0
TURN = 9  # calls at one edge before the next edge's turn


# -- a node process ----------------------------------------------------------------------------------------------------

variant = "separate"


def changed(name: str, schema: str) -> str:
    """A statement as the present variant has it."""
    text = statements.statement(name, schema)
    if name == "claim" and (variant == "tick" or variant.endswith("-flush")):
        return _replaced(text, ", set_config('synchronous_commit', 'off', true)", "")
    if variant.startswith("write"):
        if name == "accept":
            source = "select m.owner as node, 'i' || m.session as word from mine m where m.owner <> $12"
        elif name == "append":
            source = "select l.sink as node, 's' || translate(l.id::text, '-', '') as word from locked l "
            source += "where l.sink <> $8"
        else:
            return text
        return _announcing(text, source, schema)
    return text


def _announcing(text: str, source: str, schema: str) -> str:
    """Have a statement that ends with a plain select notify the nodes of ``source`` too."""
    scope = sha256(schema.encode()).hexdigest()[:16]
    woken = f""", woken as materialized (
    select pg_notify('pgmcp_{scope}_' || translate(node::text, '-', ''), string_agg(distinct word, ','))
    from ({source}) x group by node
)
select"""
    text = _replaced(text, "\n)\nselect\n", "\n)" + woken + "\n")
    return _replaced(text, "\nfrom asked a\n", "\nfrom (select count(*) from woken) w cross join asked a\n")


def _replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        message = f"the statement has changed: {old!r} is in it {text.count(old)} times"
        raise RuntimeError(message)
    return text.replace(old, new)


class CountingDatabase(database.Database):
    """Counts statements; the line's are not among them."""

    count = 0

    async def fetch(self, name: str, *args: object, **more: Any) -> list[Any]:
        """Count and pass on."""
        self.count += 1
        return await super().fetch(name, *args, **more)


class SwitchedNotifier(TableNotifier):
    """Carries wake-ups the present variant's way; the other nodes' sockets are named after their ids."""

    folder = Path()

    def __init__(self, pool: database.Database) -> None:
        super().__init__(pool)
        self._peers: dict[NodeId, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def notify(self, payloads: Sequence[tuple[NodeId | None, str]]) -> None:
        """See ``Notifier.notify``."""
        if variant == "tick":
            await asyncio.sleep(TICK)
        if variant.startswith("write"):
            return  # the statement itself has notified
        if variant.startswith("direct"):
            await asyncio.gather(*(self._tell(peer, text) for peer, text in payloads if peer is not None))
            return
        await super().notify(payloads)

    async def _tell(self, peer: NodeId, text: str) -> None:
        if peer not in self._peers:
            self._peers[peer] = await asyncio.open_unix_connection(self.folder / peer.hex)
        reader, writer = self._peers[peer]
        try:
            async with asyncio.timeout(DEADLINE):
                writer.write(text.encode() + b"\n")
                await reader.readexactly(1)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise DatabaseUnavailable(str(error)) from error


class EchoAdapter:
    """Answers every request after ``SERVER_WORK``."""

    hooks = Hooks()

    @asynccontextmanager
    async def lifespan(self, shared: Shared) -> AsyncIterator[None]:
        """Nothing to start."""
        yield

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Without a session nothing is asked here."""
        raise NotImplementedError

    def end_streams(self) -> None:
        """There are none."""

    async def converse(self, session_id: str, conversation: Conversation) -> None:
        """Echo."""
        while (incoming := await conversation.receive()) is not None:
            work(SERVER_WORK)
            request = json.loads(incoming.body)
            answer = {"jsonrpc": "2.0", "id": request["id"], "result": request["params"]}
            await conversation.emit(Outgoing(Kind.RESULT, json.dumps(answer).encode(), json.dumps(request["id"])))

    def describe(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        """Of an exchange: its headers."""
        return {"headers": [[name.decode(), value.decode()] for name, value in scope["headers"]]}


def work(seconds: float) -> None:
    """Use CPU."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


class BenchNode:
    """One node, fed over a unix socket: ``v NAME``, ``o`` (open a session), ``n`` (statements), ``c SESSION ID``."""

    def __init__(self, name: str, url: str) -> None:
        self._settings = Settings(database_url=url, node_name=name, response="json", pool_size=6)
        self._clock, self._ids = Clock(), Ids()
        self._database = CountingDatabase(self._settings, self._clock)
        self._box = KeyRing(self._database, CONTEXTS, KeyWrapping([]))
        self._bodies = Bodies(self._settings.max_body, self._clock)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, folder: Path) -> None:
        """Serve until standard input ends."""
        SwitchedNotifier.folder = folder
        await self._database.open()
        await self._box.load()
        self._here = incarnation.Incarnation(
            self._settings, self._database, self._box, Payloads.of(self._database, KeyWrapping([])), EchoAdapter(),
            Admission(self._clock), TablePublications(self._database, self._clock, self._ids),
            PostgresSubscriptionBus(), self._clock, self._ids,
            revision=head(), serves="echo", faults=Faults(), busy=lambda: 0,
        )  # fmt: skip
        await self._here.start()
        living = asyncio.create_task(self._here.run())
        peers = await asyncio.start_unix_server(self._peer, folder / self._here.node_id.hex)
        clients = await asyncio.start_unix_server(self._client, folder / self._settings.node_name)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for server in (peers, clients):
            server.close()
        self._here.over.set()
        await living
        await self._here.stop()
        await self._database.close()

    async def _peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            self._here.line._on_payload(line.decode().strip())  # noqa: SLF001 - as if the line had heard it
            writer.write(b"+")

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        global variant  # noqa: PLW0603 - statements and notifier look at it
        while line := await reader.readline():
            words = line.decode().split()
            match words[0]:
                case "v":
                    variant = words[1]
                    writer.write(b"ok\n")
                case "o":
                    writer.write((await self._open()).encode() + b"\n")
                case "n":
                    writer.write(b"%d\n" % self._database.count)
                case _:
                    task = asyncio.create_task(self._call(words[1], words[2], writer))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    async def _open(self) -> str:
        name, standalone = f"bench-{self._ids.token()}", StreamId(self._ids.uuid())
        await self._here.host.open(NewSession(name, ANONYMOUS, "streamable", standalone))
        return name

    async def _call(self, session: str, number: str, writer: asyncio.StreamWriter) -> None:
        """Answer one POST; as under uvicorn, the client has its answer before the exchange lets go of the stream."""
        start = time.perf_counter()
        work(HTTP_WORK)
        body = b'{"jsonrpc":"2.0","id":%s,"method":"tools/call","params":{"name":"echo"}}' % number.encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/mcp",
            "query_string": b"",
            "headers": [(b"accept", b"application/json"), (b"mcp-session-id", session.encode())],
        }

        parts: list[Message] = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            if not parts:
                await asyncio.get_running_loop().create_future()  # the client stays
            return parts.pop()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                took = time.perf_counter() - start if b'"result"' in message["body"] else -1.0
                writer.write(b"%f\n" % took)

        try:
            limits = self._settings
            call = HttpExchange(Request(scope), Connection(receive, send, limits.write_timeout))
            with self._bodies.body(call.caller) as held:
                await call.read(held, limits.max_body, limits.read_timeout)
                await PostHandler(self._here.edge, call, held).answer()
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            writer.write(b"-1\n")
            raise


# -- the client --------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """A session and the connections that its client has to all nodes."""

    id: str
    owner: int
    links: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    count: int = 0

    async def call(self, edge: int) -> float:
        """One call by way of a node; seconds at the edge."""
        self.count += 1
        took = float(await ask(self.links[edge], f"c {self.id} {self.count}"))
        if took < 0:
            message = "a call failed"
            raise RuntimeError(message)
        return took


@dataclass
class Found:
    """What the rounds of one variant found."""

    added: dict[float, list[float]] = field(default_factory=lambda: defaultdict(list))
    alone: list[float] = field(default_factory=list)
    rate: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statements: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


async def ask(link: tuple[asyncio.StreamReader, asyncio.StreamWriter], line: str) -> str:
    """One line there, one line back."""
    link[1].write(line.encode() + b"\n")
    async with asyncio.timeout(20):
        return (await link[0].readline()).decode().strip()


class Bench:
    """Drives the nodes."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._sessions: list[Session] = []

    async def prepare(self) -> None:
        """Connect and open the sessions, owned by the nodes in turn."""
        self._control = [await self._link(number) for number in range(NODES)]
        for number in range(SESSIONS):
            owner = number % NODES
            links = [await self._link(other) for other in range(NODES)]
            self._sessions.append(Session(await ask(self._control[owner], "o"), owner, links))

    async def _link(self, number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self._folder / f"node-{number}")

    async def round(self, name: str, found: Found) -> None:
        """Measure one variant once."""
        for link in self._control:
            await ask(link, f"v {name}")
        await self._load(self._sessions, "round robin", 0.2)  # each connection prepares the changed statements
        near, far = await self._alternate(self._sessions[0])
        found.alone.append(percentile(near, 0.5) * 1000)
        for part in (0.5, 0.95):
            found.added[part].append((percentile(far, part) - percentile(near, part)) * 1000)
        for place in PLACES:
            _, rate, statements_per_call = await self._load(self._sessions, place, self._seconds)
            found.rate[place].append(rate)
            found.statements[place].append(statements_per_call)

    async def _alternate(self, session: Session) -> tuple[list[float], list[float]]:
        """Latencies of one session's calls at the owner and elsewhere, in turns of a few calls."""
        took: tuple[list[float], list[float]] = [], []
        end_at = time.perf_counter() + 2 * self._seconds
        while time.perf_counter() < end_at:
            for shift in (0, 1):
                edge = (session.owner + shift) % NODES
                took[shift].extend([await session.call(edge) for _ in range(TURN)][1:])  # the first meets a release
        return took

    async def _load(self, sessions: list[Session], place: str, seconds: float) -> tuple[list[float], float, float]:
        before = await self._statements()
        start = time.perf_counter()
        took = await asyncio.gather(*(self._until(session, place, start + seconds) for session in sessions))
        elapsed = time.perf_counter() - start
        await asyncio.sleep(0.05)  # the last streams are let go
        calls = sum(len(values) for values in took)
        return (
            [value for values in took for value in values],
            calls / elapsed,
            (await self._statements() - before) / calls,
        )

    async def _until(self, session: Session, place: str, end_at: float) -> list[float]:
        took = []
        while time.perf_counter() < end_at:
            shift = {"edge = owner": 0, "edge ≠ owner": 1, "round robin": session.count}[place]
            took.append(await session.call((session.owner + shift) % NODES))
        return took

    async def _statements(self) -> int:
        return sum([int(await ask(link, "n")) for link in self._control])


async def drive(folder: Path, given: argparse.Namespace) -> dict[str, Found]:
    """Alternate between the variants."""
    bench = Bench(folder, given.seconds)
    await bench.prepare()
    found = {name: Found() for name in given.variants}
    for number in range(given.rounds):
        for name in given.variants if number % 2 == 0 else reversed(given.variants):
            await bench.round(name, found[name])
    return found


def report(found: dict[str, Found]) -> None:
    """Print the tables."""
    print(f"\nOne session, ms: edge = owner, and what edge ≠ owner adds; {NODES} processes\n")
    rows = [
        [name, spread(each.alone, ".2f"), spread(each.added[0.5], "+.2f"), spread(each.added[0.95], "+.2f")]
        for name, each in found.items()
    ]
    table(("variant", "edge = owner p50", "added p50", "added p95"), rows)
    print(f"\n{SESSIONS} sessions, owned by the nodes in turn: calls/s\n")
    rows = [[name, *(spread(each.rate[place], ".0f") for place in PLACES)] for name, each in found.items()]
    table(("variant", *PLACES), rows)
    print(f"\n{SESSIONS} sessions: statements per call (accept, claim, append, read, release, NOTIFY; grouped)\n")
    rows = [[name, *(spread(each.statements[place], ".2f") for place in PLACES)] for name, each in found.items()]
    table(("variant", *PLACES), rows)


def run(given: argparse.Namespace) -> None:
    """Start PostgreSQL and the nodes, measure, clean up."""
    print(f"{machine()}; imitated: HTTP {HTTP_WORK * 1e6:.0f} µs, MCP server {SERVER_WORK * 1e6:.0f} µs")
    children: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="pgmcp-hop-") as folder, postgres() as server:
        try:
            for number in range(NODES):
                env = {"PGMCP_DATABASE_URL": server.url}
                children.append(spawn("hop.py", "--node", f"node-{number}", "--folder", folder, env=env))
            if any(child.stdout is None or child.stdout.readline() != "ready\n" for child in children):
                message = "a node did not start"
                raise RuntimeError(message)
            report(uvloop.run(drive(Path(folder), given)))
        finally:
            end(children)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measuring run")
    parser.add_argument("--variants", type=lambda text: tuple(text.split(",")), default=VARIANTS)
    parser.add_argument("--node", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.variants) - set(VARIANTS):
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}")
    if given.node is None:
        run(given)
        return
    database.statement = changed  # type: ignore[attr-defined,assignment]  # as it is imported there
    incarnation.TableNotifier = SwitchedNotifier  # type: ignore[attr-defined,assignment]
    with suppress(KeyboardInterrupt):
        uvloop.run(BenchNode(given.node, os.environ["PGMCP_DATABASE_URL"]).run(given.folder))


if __name__ == "__main__":
    main()
