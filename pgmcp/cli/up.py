"""``pgmcp up``: a whole cluster on this machine.

Invariants:
    * Nothing outlives this process: PostgreSQL and the nodes are its children, and the kernel ends them with it.
    * The database's address, which holds a password, reaches the nodes by environment, never by argument.
    * The way down is the way up reversed: the entry port closes, the nodes drain, then PostgreSQL stops.

Failure handling:
    A node that dies is reported and gets no more requests; the work goes on while one is left. A node that does
    not become ready ends the whole, since every node runs the same target.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import uvicorn

import pgmcp
from pgmcp.cli.entry import Entry
from pgmcp.cli.options import arguments, environment, load, settings_options
from pgmcp.clock import Clock
from pgmcp.embedded import EmbeddedPostgres, bound_to_parent, free_port
from pgmcp.errors import SettingsError, TargetError
from pgmcp.settings import Settings
from pgmcp.store import migrations

START_LIMIT = 60.0  # seconds for the nodes to become ready
DRAIN_LIMIT = 60.0  # seconds for the nodes to leave, before they are killed
LAST_BYTES = 2.0  # seconds for the entry port to deliver what the nodes have said

SNIPPET = """\
    import asyncio
    from mcp import Client

    async def main():
        async with Client("{url}") as client:
            print([tool.name for tool in (await client.list_tools()).tools])

    asyncio.run(main())
"""


@click.command()
@click.argument("target", required=False)
@click.option("--nodes", "count", type=click.IntRange(1, 64), default=3, show_default=True, help="How many nodes.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that keeps the embedded PostgreSQL's data; without it the data go when the cluster stops.",
)
@settings_options(without=("node_name", "address"))
@click.pass_context
def up(ctx: click.Context, target: str | None, count: int, data_dir: Path | None, given: dict[str, Any]) -> None:
    """Run a local cluster: PostgreSQL, nodes, and one port that spreads every request over them in turn.

    TARGET is the MCP server, module:attribute or path/to/file.py:attribute; without it an example that uses every
    part of MCP is served. The nodes listen on the ports after --port (0 takes free ones everywhere). PostgreSQL is
    an embedded one, or the one of --database-url. Ctrl-C or SIGTERM drains the cluster and ends it with code 0.
    """
    settings = load(given)
    target = target or _example()
    # Until the event loop handles signals, SIGTERM unwinds as Ctrl-C does, so that what was started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _entry_socket(settings) as entry_socket:
        ports = _node_ports(settings.port, count)
        with _database(settings, data_dir, count) as url:
            migrations.upgrade(url, settings.schema_name)
            passed = {name: value for name, value in given.items() if name not in ("host", "port")}
            cluster = LocalCluster(settings, target, ports, _node_environment(settings, passed, url), arguments(passed))
            if not settings.database_url:
                click.echo(f"database  {url}")
            code = asyncio.run(cluster.run(entry_socket))
    ctx.exit(code)


@dataclass(slots=True)
class Node:
    """One child process that runs a node."""

    name: str
    port: int
    process: Process

    @property
    def url(self) -> str:
        """The node's own address."""
        return f"http://127.0.0.1:{self.port}"

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal, unless the node has ended."""
        if self.process.returncode is None:
            self.process.send_signal(signum)


@dataclass
class LocalCluster:
    """The nodes and the entry port, from start to drain."""

    settings: Settings
    target: str
    ports: list[int]
    env: dict[str, str]
    options: list[str]
    clock: Clock = field(default_factory=Clock)
    nodes: list[Node] = field(default_factory=list)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, entry_socket: socket.socket) -> int:
        """Run until a signal, or until no node is left.

        Args:
            entry_socket: bound to the entry port, not listening yet.

        Returns:
            The exit code: 0 after a drain, 1 when all nodes died, a node's own code when it did not come up.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._leave)
        try:
            for number, port in enumerate(self.ports, start=1):
                self.nodes.append(await self._spawn(f"node-{number}", port))
            if code := await self._unready():
                return code
            if self.leaving.is_set():
                return 0
            return await self._serve(entry_socket)
        finally:
            await self._drain()

    def _leave(self) -> None:
        if self.leaving.is_set():  # asked again: the nodes end at once on their second signal
            self._signal_nodes(signal.SIGTERM)
        self.leaving.set()

    def _signal_nodes(self, signum: signal.Signals) -> None:
        for node in self.nodes:
            node.signal(signum)

    async def _spawn(self, name: str, port: int) -> Node:
        command = [sys.executable, "-m", "pgmcp", "serve", self.target, "--node-name", name]
        command += ["--host", "127.0.0.1", "--port", str(port), *self.options]
        process = await asyncio.create_subprocess_exec(
            *command,
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,  # our own output is for what up says
            start_new_session=True,  # Ctrl-C is for us: the entry port closes before the nodes drain
            # Killed, not asked to drain: when we die without a word, the database is gone as well.
            preexec_fn=bound_to_parent(signal.SIGKILL),
        )
        return Node(name, port, process)

    async def _unready(self) -> int:
        """Wait for all nodes; 0 if all are ready (or a signal came), else the exit code."""
        waits = [asyncio.ensure_future(self._is_ready(node)) for node in self.nodes]
        left = asyncio.ensure_future(self.leaving.wait())
        started = asyncio.ensure_future(_all_true(waits))
        tasks: set[asyncio.Future[Any]] = {started, left}
        await asyncio.wait(tasks, timeout=START_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        ready = started.done() and started.result()
        for task in (left, started, *waits):
            task.cancel()
        await asyncio.gather(left, started, *waits, return_exceptions=True)
        if ready or self.leaving.is_set():
            return 0
        for node, wait in zip(self.nodes, waits, strict=True):
            if node.process.returncode is not None:
                click.echo(f"{node.name} ended with code {node.process.returncode} before it was ready", err=True)
            elif wait.cancelled():
                click.echo(f"{node.name} was not ready within {START_LIMIT:.0f} s", err=True)
        codes = [node.process.returncode for node in self.nodes]
        return next((code for code in codes if code is not None and 0 < code <= 4), 1)

    async def _is_ready(self, node: Node) -> bool:
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=5.0) as client:  # noqa: S501 - plain HTTP
            while node.process.returncode is None:
                try:
                    if (await client.get(f"{node.url}/readyz")).status_code == httpx.codes.OK:
                        return True
                except httpx.TransportError:
                    pass  # it does not listen yet
                await self.clock.sleep(0.05)
        return False

    async def _serve(self, entry_socket: socket.socket) -> int:
        """Run the entry port until a signal or until no node is left."""
        entry = Entry({node.name: node.port for node in self.nodes})
        server = _Server(_entry_config(entry))
        serving = asyncio.ensure_future(server.serve(sockets=[entry_socket]))
        left = asyncio.ensure_future(self.leaving.wait())
        watches = asyncio.ensure_future(self._watch_all(entry))
        tasks: set[asyncio.Future[Any]] = {serving, left, watches}
        try:
            while not server.started and not serving.done():
                await self.clock.sleep(0.01)
            self._announce(entry_socket.getsockname()[1])
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return 0 if self.leaving.is_set() else 1
        finally:
            self.leaving.set()
            server.should_exit = True
            await self._drain()
            await asyncio.wait({serving}, timeout=LAST_BYTES)
            server.force_exit = True
            await asyncio.gather(*tasks)
            await entry.aclose()

    async def _watch_all(self, entry: Entry) -> None:
        await asyncio.gather(*(self._watch(node, entry) for node in self.nodes))

    async def _watch(self, node: Node, entry: Entry) -> None:
        code = await node.process.wait()
        entry.drop(node.name)
        if not self.leaving.is_set():
            left = sum(other.process.returncode is None for other in self.nodes)
            click.echo(f"{node.name} ended with code {code}; {left} of {len(self.nodes)} nodes left", err=True)

    async def _drain(self) -> None:
        """Have the nodes leave; harmless when they have."""
        self._signal_nodes(signal.SIGTERM)
        ended = [asyncio.ensure_future(node.process.wait()) for node in self.nodes]
        if ended:
            await asyncio.wait(ended, timeout=DRAIN_LIMIT)
        self._signal_nodes(signal.SIGKILL)
        await asyncio.gather(*ended)

    def _announce(self, port: int) -> None:
        host = "127.0.0.1" if self.settings.host in ("", "0.0.0.0", "::") else self.settings.host  # noqa: S104 - compared
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}{self.settings.mcp_path}"
        for node in self.nodes:
            click.echo(f"{node.name:<8}  {node.url}{self.settings.mcp_path}")
        click.echo(f"MCP       {url}\n\nConnect a client:\n\n{SNIPPET.format(url=url)}\nready")
        sys.stdout.flush()


async def _all_true(waits: Sequence[asyncio.Future[bool]]) -> bool:
    """Whether all waits end with True; the first False is the answer, without waiting for the others."""
    for wait in asyncio.as_completed(waits):
        if not await wait:
            return False
    return True


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the cluster says when the entry port closes."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _entry_config(entry: Entry) -> uvicorn.Config:
    # What goes wrong at the entry port is the nodes' or the clients' matter and is told to the client.
    return uvicorn.Config(
        entry,
        http="httptools",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        access_log=False,
        log_config=None,
        log_level="critical",
    )


def _example() -> str:
    """The bundled example: inside the package in a wheel, beside it in a checkout.

    Raises:
        TargetError: it is in neither place.
    """
    package = Path(pgmcp.__file__).parent
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / "everything.py").is_file():
            return f"{folder / 'everything.py'}:mcp"
    message = "This installation has no bundled example. Name a TARGET: module:attribute or path/to/file.py:attribute."
    raise TargetError(message)


@contextmanager
def _entry_socket(settings: Settings) -> Iterator[socket.socket]:
    """Take the entry port at once, but do not listen yet: clients are refused until the cluster is ready."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named, since asyncio turns Nagle's delay off only where it sees that this is TCP.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as taken:
        _bind(taken, settings.host, settings.port)
        yield taken


def _node_ports(port: int, count: int) -> list[int]:
    if not port:
        return [free_port() for _ in range(count)]
    ports = list(range(port + 1, port + 1 + count))
    for number in ports:
        with socket.socket() as probe:
            _bind(probe, "127.0.0.1", number)
    return ports


def _bind(taken: socket.socket, host: str, port: int) -> None:
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        message = f"Cannot listen on {host}:{port}: {error}. Choose another --port; the nodes take the ones after it."
        raise SettingsError(message) from error


@contextmanager
def _database(settings: Settings, data_dir: Path | None, count: int) -> Iterator[str]:
    """The given database, or an embedded one for as long as the cluster runs."""
    if settings.database_url:
        yield settings.database_url
        return
    data = data_dir or Path(tempfile.gettempdir()) / f"pgmcp-up-{secrets.token_hex(8)}"
    connections = max(100, count * (settings.pool_size + 4) + 20)
    # Commits take as long as they do in earnest, even where nobody will miss the data; only the set-up is hasty.
    earnest = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
    durable = data_dir is not None
    server = EmbeddedPostgres(data, settings={**earnest, "max_connections": str(connections)}, durable=durable)
    try:
        with server:
            yield server.url
    finally:
        if data_dir is None:
            shutil.rmtree(server.home, ignore_errors=True)


def _node_environment(settings: Settings, given: dict[str, Any], url: str) -> dict[str, str]:
    env = {**os.environ, **environment(given), **environment({"database_url": url})}
    if not settings.database_url:
        env.pop("PGMCP_LISTEN_URL", None)  # it would be another database's
    return env
