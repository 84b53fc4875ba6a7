"""How the response of one HTTP exchange is written.

Invariants:
- Trust is asked for before each piece that is written, when there is nothing left to wait for, neither the database nor
  the client (G9). Without it the client gets comments only.
- An exchange ends when its token has expired, as if the connection had broken: its client goes on with another one.
  What it has begun to write, it writes to its end. Only what was cut in the middle ends abruptly.
"""

from __future__ import annotations

from pgmcp.clock import Clock
from pgmcp.cluster.lease import Lease
from pgmcp.settings import Settings
from pgmcp.web.connection import PIECE_BYTES, Connection, Watch
from pgmcp.web.open_streams import OpenStream
from pgmcp.web.token_expiry import TokenExpiry

SUSPENDED_SECONDS = 120.0
"""Seconds without trust after which streams end, for clients to try elsewhere."""


class ResponseWriter:
    """Writes one response.

    Args:
        open_stream: what is heard of the stream that it carries.
        expiry: of the token that opened the exchange.
        headers: further response headers.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        *,
        lease: Lease,
        settings: Settings,
        clock: Clock,
        connection: Connection,
        expiry: TokenExpiry,
        headers: dict[str, str],
    ) -> None:
        self._open_stream, self._lease, self._settings = open_stream, lease, settings
        self._clock, self._connection, self._expiry, self._headers = clock, connection, expiry, headers
        self._left = False
        self._written = clock.boottime()

    @property
    def gone(self) -> bool:
        """Whether the client has left, or was dropped."""
        return self._left or self._connection.gone

    @property
    def goes_on(self) -> bool:
        """Whether to wait for more: the client is there, its token good, and the node not without trust for long."""
        return not self.gone and not self._expiry.passed and self._lease.suspended_for < SUSPENDED_SECONDS

    @property
    def silent(self) -> float:
        """Seconds since something was written."""
        return self._clock.boottime() - self._written

    async def acting(self) -> None:
        """Return when the node may act.

        Raises:
            Fenced: it never may again.
        """
        await self._lease.acting()

    async def start(self, status: int, headers: dict[str, str]) -> None:
        """Begin the response."""
        pairs = [(name.encode(), value.encode()) for name, value in (headers | self._headers).items()]
        await self._connection.send({"type": "http.response.start", "status": status, "headers": pairs})

    async def put(self, text: bytes, *, inside: bool = False, more: bool = True) -> bool:
        """Write what may be written with trust only, piece by piece; whether all of it was written.

        Args:
            inside: nothing else, no comment either, may come before it.
            more: whether the body goes on after it.
        """
        for start in range(0, len(text), PIECE_BYTES):
            if not await self.may_write(inside=inside or start > 0):
                return False
            end = start + PIECE_BYTES
            self._written = self._clock.boottime()
            await self._connection.send(
                {"type": "http.response.body", "body": text[start:end], "more_body": more or end < len(text)}
            )
        return not self.gone

    async def may_write(self, *, inside: bool = False) -> bool:
        """Return True when an event may be written at once: trust is asked for last (G9). False: never any more.

        Args:
            inside: what is being written cannot stop here; without trust for too long, the connection is cut.
        """
        while not self.gone and self._lease.suspended_for < SUSPENDED_SECONDS:
            await self._connection.ready()
            if self._expiry.passed and not inside:
                return False
            if self._lease.trusted:
                return not self.gone
            if await self._lease.trusted_within(self._settings.keepalive):
                continue
            if not inside:
                await self.comment()
                if self._open_stream.over:
                    return False
        if inside:
            self.abort()
        return False

    async def comment(self) -> None:
        """Show the client, and what stands between, that the connection lives."""
        await self.write(b": \r\n\r\n")

    async def write(self, chunk: bytes) -> None:
        """Write what needs no trust."""
        self._written = self._clock.boottime()
        await self._connection.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self, chunk: bytes) -> None:
        """Write the last of the body."""
        await self._connection.send({"type": "http.response.body", "body": chunk})

    def abort(self) -> None:
        """Cut the connection: what was begun cannot be written to its end."""
        self._connection.abort()

    def watching(self) -> Watch:
        """Notice the client's disconnect for as long as the context lasts."""
        return Watch(self._connection.receive, self._on_gone)

    def _on_gone(self) -> None:
        self._left = True
        self._open_stream.moved.set()
