"""One node in a thread of its own, so that hypothesis's plain functions can send it whatever they like."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from pytest_postgresql.executors import NoopExecutor

from pgmcp.clock import Clock
from pgmcp.web import bodies
from tests.conftest import temporary_database
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, everything, running_node, tables_of

BOUND = 8.0
AGED = "update pgmcp.sessions set last_active_at = last_active_at - interval '2 minutes' where transport = 'sse'"
GONE = {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}
"""The server has ended the connection, and what it said before may be lost."""

ACCEPT = b"accept: application/json, text/event-stream\r\n"


@dataclass
class Answer:
    """What came over the socket until it was closed, silent, or known to be a stream."""

    raw: bytes

    @property
    def status(self) -> int | None:
        """The status of the first response; None when there was none."""
        first = self.raw.split(b"\r\n", 1)[0].split(b" ")
        return int(first[1]) if len(first) > 1 and first[0].startswith(b"HTTP/1.") else None


@dataclass
class Target:
    """The node, and what a test needs to see of it."""

    loop: asyncio.AbstractEventLoop
    node: RunningNode
    tables: Tables
    session: RawSession

    def run(self, coroutine: Any) -> Any:
        """Run something in the node's loop."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(BOUND * 2)

    def send(self, raw: bytes, *, half_close: bool = True, bound: float = BOUND) -> Answer:
        """Send bytes; fail when nothing, not even the end, comes within the bound.

        ``half_close`` ends our side, so that a server that waits for more bytes has no reason to.
        """
        at = urlsplit(self.node.url)
        got = b""
        with socket.create_connection((at.hostname, at.port), timeout=bound) as client:
            try:
                client.sendall(raw)
                if half_close:
                    client.shutdown(socket.SHUT_WR)
                while piece := client.recv(65536):
                    got += piece
                    if not half_close and complete(got):
                        break
            except TimeoutError:
                raise AssertionError(f"no end within {bound} s after {got[:200]!r}") from None
            except OSError as error:
                if error.errno not in GONE:
                    raise
        return Answer(got)

    def exchange(self, method: str, path: str, headers: bytes = b"", body: bytes | None = None) -> Answer:
        """One well-formed HTTP exchange; of a stream, only the head is awaited."""
        length = b"" if body is None else b"content-length: %d\r\n" % len(body)
        host = urlsplit(self.node.url).netloc.encode()
        head = b"%s %s HTTP/1.1\r\nhost: %s\r\n" % (method.encode(), path.encode(), host)
        return self.send(head + headers + length + b"\r\n" + (body or b""), half_close=False)

    def post(self, path: str, body: bytes) -> Answer:
        """One POST in the session."""
        headers = b"content-type: application/json\r\nmcp-session-id: %s\r\n" % str(self.session.session_id).encode()
        return self.exchange("POST", path, ACCEPT + headers, body)

    async def _held(self) -> dict[str, int]:
        part = self.node.incarnation
        rows = await self.tables.counts()
        return {
            "open_streams": len(part.open_streams),
            "residents": part.host.sessions,
            "tasks of the host": part.host.under_way,
            "sinks": await self.tables.value("select count(*) from pgmcp.streams where sink is not null"),
            "sessions": rows["sessions"],
            "unfinished": await self.tables.value("select count(*) from pgmcp.requests where finished_at is null"),
        }

    def held(self) -> dict[str, int]:
        """What the node holds now."""
        return dict(self.run(self._held()))

    def settled(self, before: dict[str, int]) -> None:
        """Wait until the node holds no more than before; HTTP+SSE sessions without a client age at once."""

        async def wait() -> None:
            end, held = self.loop.time() + BOUND, await self._held()
            while any(held[name] > before[name] for name in before):
                assert self.loop.time() < end, f"{before} has become {held}"
                await asyncio.sleep(0.02)
                await self.tables.execute(AGED)
                await self.node.sweep()
                held = await self._held()

        self.run(wait())

    def serves(self) -> None:
        """Check that the node still serves good calls."""
        assert self.run(self.session.call(self.node.url, "ping"))["result"] == {}
        assert self.exchange("GET", "/livez").status == 200
        assert self.exchange("GET", "/readyz").status == 200


def complete(got: bytes) -> bool:
    """Whether a response is there: its head, and its body unless it is a stream."""
    head, found, body = got.partition(b"\r\n\r\n")
    if not found:
        return False
    lowered = head.lower()
    if b"content-length: " not in lowered:
        return True
    return len(body) >= int(lowered.split(b"content-length: ")[1].split(b"\r\n")[0])


@pytest.fixture(scope="module")
def target(template: NoopExecutor) -> Iterator[Target]:
    """A node for the whole module."""
    loop, ready, stop = asyncio.new_event_loop(), Future[Target](), asyncio.Event()

    async def main() -> None:
        try:
            async for database in temporary_database(template.template_dbname):
                async with (
                    running_node(database, everything(), "fuzz", Clock(), max_body=100_000, initialize_rate=0) as node,
                    tables_of(database) as tables,
                    RawSession(protocol_version="2025-03-26") as session,
                ):
                    await session.open(node.url)
                    ready.set_result(Target(loop, node, tables, session))
                    await stop.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "REFUSED_SECONDS", 0.1)  # nearly every body here is refused
        thread.start()
        try:
            yield ready.result(30)
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(30)


@pytest.fixture
def watched(target: Target, caplog: pytest.LogCaptureFixture) -> Iterator[Target]:
    """The node, which must hold no more after the test than before, and must still serve."""
    target.serves()
    before = target.held()
    target.settled({**before, "open_streams": 0, "sinks": 0, "tasks of the host": 0, "unfinished": 0})
    before = target.held()
    yield target
    target.settled(before)
    target.serves()
    worse = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert worse == []
