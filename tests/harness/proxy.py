"""A proxy before PostgreSQL in the test's own event loop, which breaks connections where a test wants it.

It knows as much of the wire protocol as it takes to see which named statement a client executes (each text begins with
``/* name */``) and when the server's whole reply is there: after that the statement is committed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from urllib.parse import urlsplit

PIECE = 1 << 16
_SSL_REQUEST, _GSS_REQUEST, _CANCEL_REQUEST = 80877103, 80877104, 80877102
_NAME = re.compile(rb"/\* (\w+) \*/")


class Cut(StrEnum):
    """Where a connection is cut."""

    BEFORE = "before the query reaches PostgreSQL"
    AFTER = "after the commit, before the reply reaches the client"
    LATE = "the query is on its way, and arrives when the test says so"


class Proxy:
    """What a test can do to connections."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._links: set[_Link] = set()
        self._cuts: list[tuple[str, Cut]] = []
        self._late: list[_Link] = []
        self._carrying = asyncio.Event()
        self._carrying.set()
        self.stalling = False
        """Let new connections be made, and say nothing on them."""
        self.refusing = False
        """Hang up on new connections at once."""
        self.hearing = asyncio.Event()
        """While it is cleared, nothing is read of what PostgreSQL says, so that its socket fills up."""
        self.hearing.set()
        self.delay = 0.0
        """Seconds by which each piece that PostgreSQL says is late."""
        self.connected = 0
        """Connections that were made so far."""

    @property
    def black_hole(self) -> bool:
        """Swallow every byte in both directions, hang-ups too; nobody hears of it."""
        return not self._carrying.is_set()

    @black_hole.setter
    def black_hole(self, swallows: bool) -> None:
        (self._carrying.clear if swallows else self._carrying.set)()

    def cut(self, statement: str, where: Cut) -> None:
        """Cut the connection that next executes this statement."""
        self._cuts.append((statement, where))

    async def deliver(self) -> None:
        """Let the queries arrive that are on their way, and return when PostgreSQL is done with them."""
        while self._late:
            await self._late.pop().arrive()

    def let_go(self) -> None:
        """Forget what is on its way."""
        while self._late:
            self._late.pop().arrived.set()

    def keep(self, link: _Link) -> None:
        """A link whose client has gone, and whose last query is on its way."""
        self._late.append(link)

    @property
    def pending(self) -> list[tuple[str, Cut]]:
        """Cuts that did not happen yet."""
        return self._cuts

    def cut_all(self, *, listening: bool | None = None) -> None:
        """Cut every connection now; or only the line (True), or only the others (False)."""
        for link in list(self._links):
            if listening in {None, link.listening}:
                link.abort()

    async def stall(self, seconds: float) -> None:
        """Let all that is said on the present connections arrive late, also when its sender has hung up meanwhile."""
        links = list(self._links)
        for link in links:
            link.flowing.clear()
        await asyncio.sleep(seconds)
        for link in links:
            link.flowing.set()

    async def close(self) -> None:
        """Cut every connection, and wait until nobody carries one any more."""
        while self._links:
            self.cut_all()
            await asyncio.sleep(0)

    def take(self, statement: str) -> Cut | None:
        """The cut that is due for a statement."""
        for due in self._cuts:
            if due[0] == statement:
                self._cuts.remove(due)
                return due[1]
        return None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until either side ends it."""
        self.connected += 1
        link = _Link(self, reader, writer)
        self._links.add(link)
        try:
            if self.stalling:
                await reader.read(-1)
            elif not self.refusing:
                await link.run(self._host, self._port)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            await self._carrying.wait()
            await link.arrived.wait()
            self._links.discard(link)
            link.abort()


class _Link:
    """One client's connection and the server's."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy, self._client, self._to_client = proxy, reader, writer
        self._to_server: asyncio.StreamWriter | None = None
        self._statements: dict[bytes, str] = {}
        self._awaits_ready = False
        self.listening = False
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._held: bytes | None = None
        self._from_server: asyncio.StreamReader | None = None
        self.arrived = asyncio.Event()
        """Whether nothing of this link is on its way."""
        self.arrived.set()

    async def arrive(self) -> None:
        """Send the server what was held, and wait until it is done with it."""
        assert self._held is not None
        assert self._to_server is not None
        assert self._from_server is not None
        self._to_server.write(self._held)
        heard = b""
        while heard[-6:-1] != b"Z\0\0\0\5":
            piece = await self._from_server.read(PIECE)
            assert piece, "PostgreSQL hung up on what came late"
            heard += piece
        self.arrived.set()

    def _hold(self, piece: bytes, *, last: bool) -> bool:
        """Hold a piece of a query; whether that was the last one."""
        self._held = (self._held or b"") + piece
        if last:
            self.arrived.clear()
            self._proxy.keep(self)
            self._to_client.transport.abort()
        return last

    def abort(self) -> None:
        self.flowing.set()
        for writer in (self._to_client, self._to_server):
            if writer is not None:
                writer.transport.abort()

    async def run(self, host: str, port: int) -> None:
        server, self._to_server = await asyncio.open_connection(host, port)
        self._from_server = server
        tasks = [asyncio.create_task(self._up()), asyncio.create_task(self._down(server))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _forward(self, writer: asyncio.StreamWriter | None, piece: bytes) -> None:
        if writer is not None and not self._proxy.black_hole:
            writer.write(piece)

    async def _up(self) -> None:
        started = False
        while True:
            kind = await self._client.readexactly(1) if started else b""
            size = await self._client.readexactly(4)
            body = await self._client.readexactly(int.from_bytes(size, "big") - 4)
            if not started:
                started = int.from_bytes(body[:4], "big") not in {_SSL_REQUEST, _GSS_REQUEST, _CANCEL_REQUEST}
            elif kind == b"P":
                name, _, rest = body.partition(b"\0")
                found = _NAME.match(rest)
                self._statements[name] = found[1].decode() if found else ""
                self.listening |= rest.startswith(b"LISTEN")
            elif kind == b"B":
                cut = self._proxy.take(self._statements.get(body.split(b"\0")[1], ""))
                if cut is Cut.BEFORE:
                    return
                self._awaits_ready |= cut is Cut.AFTER
                self._held = b"" if cut is Cut.LATE else None
            if self._held is not None:
                if self._hold(kind + size + body, last=kind == b"S"):
                    return
                continue
            await self.flowing.wait()
            self._forward(self._to_server, kind + size + body)

    async def _down(self, server: asyncio.StreamReader) -> None:
        while piece := await server.read(PIECE):
            if self._proxy.delay:
                await asyncio.sleep(self._proxy.delay)
            await self._proxy.hearing.wait()
            await self.flowing.wait()
            if not self._awaits_ready:
                self._forward(self._to_client, piece)
            elif piece[-6:-1] == b"Z\0\0\0\5":
                return


@asynccontextmanager
async def proxied(database: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before a database, and the database's address through it."""
    at = urlsplit(database)
    proxy = Proxy(at.hostname or "127.0.0.1", at.port or 5432)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    login = at.netloc.rpartition("@")[0]
    try:
        yield proxy, at._replace(netloc=f"{login}@127.0.0.1:{port}").geturl()
    finally:
        listener.close()
        proxy.black_hole, proxy.refusing = False, True
        proxy.let_go()
        await proxy.close()
        await listener.wait_closed()
