"""The processes of a cluster on this machine: nodes, and the entry port before them.

Invariants:
    * No node outlives this process: they are its children, and the kernel ends them with it.
    * The way down is the way up reversed: the entry port closes, then the nodes drain.

Failure handling:
    A node that dies is reported and gets no more requests; the work goes on while one is left. A node that does
    not become ready ends the whole, since every node runs the same target.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx
import uvicorn

from pgmcp.cli.options import PGMCP
from pgmcp.cli.round_robin_proxy import RoundRobinProxy
from pgmcp.cli.signals import ended_by
from pgmcp.clock import Clock
from pgmcp.embedded import bound_to_parent
from pgmcp.settings import Settings

START_SECONDS = 60.0  # seconds for the nodes to become ready
DRAIN_SECONDS = 60.0  # seconds for the nodes to leave, before they are killed
LAST_DELIVERY_SECONDS = 2.0  # seconds for the entry port to deliver what the nodes have said
LAST_WORK_SECONDS = 5.0  # seconds for the work to end, once it was told to


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
    """The nodes and the entry port, from start to drain.

    Args:
        settings: where the entry port is.
        target: the MCP server that every node serves.
        ports: one for each node, on 127.0.0.1.
        entry_socket: bound to the entry port, not listening yet.
        env: the nodes' environment, with the database's address.
        options: further arguments of ``pgmcp serve``.
        report: is told in one line what becomes of the nodes.
        output: where the nodes log to.
    """

    settings: Settings
    target: str
    ports: list[int]
    entry_socket: socket.socket
    env: dict[str, str]
    options: list[str]
    report: Callable[[str], None]
    output: TextIO = field(default_factory=lambda: sys.stderr)  # our own output is for what the command says
    clock: Clock = field(default_factory=Clock)
    nodes: list[Node] = field(default_factory=list)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    entry: RoundRobinProxy = field(init=False)

    def __post_init__(self) -> None:
        names = {f"node-{number}": port for number, port in enumerate(self.ports, start=1)}
        self.entry = RoundRobinProxy(names, self.clock, self.report)

    @property
    def url(self) -> str:
        """The MCP endpoint at the entry port."""
        given = self.settings.host
        host = "127.0.0.1" if given in ("", "0.0.0.0", "::") else given  # noqa: S104 - compared
        port = self.entry_socket.getsockname()[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}{self.settings.mcp_path}"

    async def run(self, work: Callable[[], Awaitable[int]]) -> int:
        """Run until a signal, until the work is done, or until no node is left.

        Args:
            work: begins when all nodes are ready and the entry port listens; cancelled at a signal.

        Returns:
            The exit code: what the work returns; 0 after a signal, 1 when all nodes died, a node's own code when
            it did not come up.
        """
        loop = asyncio.get_running_loop()
        for signum in ended_by():
            loop.add_signal_handler(signum, self._leave)
        try:
            for count in (1, len(self.ports)):  # the first one alone: what is wrong with the target is said once
                for number in range(len(self.nodes), count):
                    self.nodes.append(await self._spawn(f"node-{number + 1}", self.ports[number]))
                if code := await self._unready():
                    return code
                if self.leaving.is_set():
                    return 0
            return await self._serve(work)
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
        command = [*PGMCP, "serve", self.target, "--node-name", name]
        command += ["--host", "127.0.0.1", "--port", str(port), *self.options]
        process = await asyncio.create_subprocess_exec(
            *command,
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
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
        await asyncio.wait(tasks, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        ready = started.done() and started.result()
        for task in (left, started, *waits):
            task.cancel()
        await asyncio.gather(left, started, *waits, return_exceptions=True)
        if ready or self.leaving.is_set():
            return 0
        dead = any(node.process.returncode is not None for node in self.nodes)
        for node, wait in zip(self.nodes, waits, strict=True):
            if node.process.returncode is not None:
                self.report(f"{node.name} ended with code {node.process.returncode} before it was ready")
            elif wait.cancelled() and not dead:
                self.report(f"{node.name} was not ready within {START_SECONDS:.0f} s")
        codes = [node.process.returncode for node in self.nodes]
        return next((code for code in codes if code is not None and code > 0), 1)

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

    async def _serve(self, work: Callable[[], Awaitable[int]]) -> int:
        """Run the entry port and the work until one of them ends, a signal comes, or no node is left."""
        server = EntryServer(entry_config(self.entry))
        serving = asyncio.ensure_future(server.serve(sockets=[self.entry_socket]))
        left = asyncio.ensure_future(self.leaving.wait())
        deaths = asyncio.ensure_future(self._await_deaths())
        watch = asyncio.ensure_future(self.entry.watch())
        working = asyncio.ensure_future(self._work(server, work))
        try:
            await asyncio.wait({serving, left, deaths, watch, working}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            return 0 if self.leaving.is_set() else 1
        finally:
            self.leaving.set()
            for task in (working, watch):
                task.cancel()
            await asyncio.wait({working, watch}, timeout=LAST_WORK_SECONDS)
            server.should_exit = True
            await self._drain()
            await asyncio.wait({serving}, timeout=LAST_DELIVERY_SECONDS)
            server.force_exit = True
            await asyncio.gather(serving, left, deaths)
            await self.entry.aclose()

    async def _work(self, server: uvicorn.Server, work: Callable[[], Awaitable[int]]) -> int:
        while not server.started:
            await self.clock.sleep(0.01)
        return await work()

    async def _await_deaths(self) -> None:
        await asyncio.gather(*(self._await_death(node) for node in self.nodes))

    async def _await_death(self, node: Node) -> None:
        code = await node.process.wait()
        self.entry.drop(node.name)
        if not self.leaving.is_set():
            left = sum(other.process.returncode is None for other in self.nodes)
            self.report(f"{node.name} ended with code {code}; {left} of {len(self.nodes)} nodes left")

    async def _drain(self) -> None:
        """Have the nodes leave; harmless when they have."""
        self._signal_nodes(signal.SIGTERM)
        self._signal_nodes(signal.SIGCONT)  # a frozen one hears of it only then
        ended = [asyncio.ensure_future(node.process.wait()) for node in self.nodes]
        if ended:
            await asyncio.wait(ended, timeout=DRAIN_SECONDS)
        self._signal_nodes(signal.SIGKILL)
        await asyncio.gather(*ended)


async def _all_true(waits: Sequence[asyncio.Future[bool]]) -> bool:
    """Whether all waits end with True; the first False is the answer, without waiting for the others."""
    for wait in asyncio.as_completed(waits):
        if not await wait:
            return False
    return True


class EntryServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: the cluster says when the entry port closes."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Keep the handlers of whoever runs the cluster."""
        yield


def entry_config(entry: RoundRobinProxy) -> uvicorn.Config:
    """How the entry port is served: what goes wrong there is the nodes' or the clients' matter, and told to clients."""
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
