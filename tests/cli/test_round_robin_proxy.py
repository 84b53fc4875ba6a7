"""The entry port of a local cluster, in front of real nodes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from pgmcp.cli.local import EntryServer, entry_config
from pgmcp.cli.round_robin_proxy import RoundRobinProxy, end_to_end
from pgmcp.clock import Clock
from tests.harness.clients import RawSession
from tests.harness.processes import NodeProcess, nodes

BOUND = 20


@pytest.fixture
def two(database: str, tmp_path: Path) -> Iterator[list[NodeProcess]]:
    with nodes("examples/everything.py:mcp", 2, database_url=database, log_dir=tmp_path) as members:
        yield members


class Port:
    """An entry port that is open, and what it reported."""

    def __init__(self, members: list[NodeProcess]) -> None:
        self.reports: list[str] = []
        self.entry = RoundRobinProxy({node.name: node.port for node in members}, Clock(), self.reports.append)
        self.url = ""
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Begin to look whether the nodes answer."""
        self._watching = asyncio.create_task(self.entry.watch())

    async def unwatch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})

    async def said(self, line: str) -> None:
        async with asyncio.timeout(BOUND):
            while line not in self.reports:  # noqa: ASYNC110 - what changes is in another process
                await asyncio.sleep(0.02)

    async def share(self, requests: int) -> dict[str, int]:
        """Send requests, one after the other; how many each node took."""
        before = self.entry.taken.copy()
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=BOUND) as client:
            for _ in range(requests):
                assert (await client.get(f"{self.url}/livez")).status_code == 200
        return dict(self.entry.taken - before)


@asynccontextmanager
async def opened(members: list[NodeProcess]) -> AsyncIterator[Port]:
    port = Port(members)
    server = EntryServer(entry_config(port.entry))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as taken:
        taken.bind(("127.0.0.1", 0))
        port.url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        serving = asyncio.create_task(server.serve(sockets=[taken]))
        try:
            async with asyncio.timeout(BOUND):
                while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.02)
            yield port
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.gather(serving, port.unwatch())
            await port.entry.aclose()


async def test_a_frozen_node_gets_no_requests_until_it_answers_again(two: list[NodeProcess]) -> None:
    async with opened(two) as port:
        port.watch()
        assert await port.share(4) == {"node-1": 2, "node-2": 2}
        two[0].pause()
        await port.said("node-1 does not answer and gets no requests")
        assert port.entry.silent == {"node-1"}
        assert await port.share(4) == {"node-2": 4}
        two[0].resume()
        await port.said("node-1 answers again and gets its share of requests")
        assert await port.share(4) == {"node-1": 2, "node-2": 2}


async def test_what_a_frozen_node_carries_is_broken_off_and_goes_on_elsewhere(two: list[NodeProcess]) -> None:
    async with opened(two) as port, RawSession() as session, httpx.AsyncClient(trust_env=False, verify=False) as client:
        await session.open(two[1].url)
        stream = await session.get(port.url)
        assert await stream.next() is not None
        assert port.entry.taken == {"node-1": 1}
        two[0].pause()
        calls = [asyncio.create_task(client.get(f"{port.url}/livez", timeout=BOUND)) for _ in range(2)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        port.watch()
        answers = await asyncio.gather(*calls)
        assert sorted(answer.status_code for answer in answers) == [200, 502]
        assert any("may have acted" in answer.text for answer in answers)
        assert await stream.rest(BOUND) == []
        assert stream.error is not None
        resumed = await session.get(port.url, stream.last_event_id)
        assert resumed.status == 200
        assert port.entry.taken == {"node-1": 1, "node-2": 2}


def test_a_connection_header_takes_nothing_from_the_node_that_it_decides_by() -> None:
    kept = [
        (b"host", b"evil.example"),
        (b"Origin", b"http://evil.example"),
        (b"authorization", b"Bearer x"),
        (b"content-length", b"2"),
        (b"x-forwarded-for", b"192.0.2.1"),
        (b"mcp-session-id", b"n1-0"),
    ]
    words = b", ".join(name for name, _ in kept)
    sent = [*kept, (b"connection", b"close, X-Hop"), (b"Connection", words), (b"x-hop", b"1"), (b"te", b"trailers")]
    assert end_to_end(sent) == kept


async def test_foreign_hosts_and_origins_are_refused_whatever_connection_says(two: list[NodeProcess]) -> None:
    async with opened(two) as port, httpx.AsyncClient(trust_env=False, timeout=BOUND) as client:
        for header, status in (("origin", 403), ("host", 421)):
            for connection in ("keep-alive", f"keep-alive, {header}", f"{header.upper()}"):
                headers = {header: "http://evil.example" if header == "origin" else "evil.example"}
                answer = await client.get(f"{port.url}/mcp", headers={**headers, "connection": connection})
                assert answer.status_code == status, (header, connection)


async def test_a_node_that_is_gone_costs_no_request(two: list[NodeProcess]) -> None:
    async with opened(two) as port:
        port.watch()
        two[0].kill()
        assert await port.share(4) == {"node-2": 4}
        assert port.entry.silent == frozenset()
        assert port.reports == []
