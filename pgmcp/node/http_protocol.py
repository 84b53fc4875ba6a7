"""HTTP/1.1 as a node speaks it: uvicorn's protocol over httptools, which has no limits of its own before the body.

Invariants:
- Nothing that is not a body takes more than ``HEAD_BYTES`` and what is read at once: not headers, not what follows a
  chunked body, not blanks between two requests.
- A request has ``HEADERS`` of them, and ``PIPELINED`` requests wait behind one that is being answered.
- The pieces of a chunked body have ``PIECE_BYTES`` on average, where there are many: each costs a turn of the parser.
- A request that has a body and asks for an upgrade is refused: the parser takes what follows its headers for something
  else.
- Headers are complete ``HEADERS_SECONDS`` after their first byte, and so is the rest of a body after its answer.
- One address has ``max_connections`` connections at most. Proxies whose ``X-Forwarded-For`` is believed have as many
  as they want, since they bring everybody; so do Unix sockets.
- What is left of a body when that was answered is read slowly, and dropped.
- What follows a chunked body (trailers) changes no header of the request.

Failure handling: 431, 408 and 503, as plain text, and the end of the connection. A connection whose answer is under way
just ends: it could not be told apart from the answer. After 431 nothing more is read, and the connection ends a second
later: it still counts as one of its address's, so that nobody is refused as fast as he can connect.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pgmcp.settings import Settings
from pgmcp.web.http_exchange import network

logger = logging.getLogger(__name__)

HEAD_BYTES = 64 * 1024
"""Bytes of a request's line and headers."""

HEADERS = 500
"""Headers of one request; each costs some hundred bytes, however short it is."""

PIPELINED = 16
"""Requests of one connection that wait while another one is answered."""

PIECES, PIECE_BYTES = 1_000, 64
"""How many pieces of a body may be of any size, and how large those of a body with more of them are on average."""

HEADERS_SECONDS = 10.0
"""Seconds from their first byte until they are complete."""

LINGER_SECONDS = 1.0
"""Seconds for which the connection of somebody whose headers were too large is kept, unread."""

SLOWLY_SECONDS = 0.1
"""Seconds between two reads (some 256 KB) of what is left of a body that was refused."""

_BODY = {b"content-length", b"transfer-encoding"}
"""Headers that announce a body, as the parser's callbacks name them."""

FILES = 65_536
"""Files, connections among them, that a node may have open where the operating system lets it."""


class _Refused(Exception):
    """What arrives costs more than it may, or cannot be told apart from something else: the parser gives up."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection; ``limited`` makes the class for one node."""

    addresses: Counter[str]
    trusted: Proxies
    most: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._address = ""
        self._timer: asyncio.TimerHandle | None = None
        self._inside = False  # between the end of a request's headers and its own
        self._quiet = 0  # bytes since something came of them
        self._large, self._why = False, ""
        self._pieces = self._size = 0  # of the body

    # -- the connection --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        host = self.client[0] if self.client else ""
        if not host or host in self.trusted:
            self._expect_request()
            return
        self._address = network(host)
        self.addresses[self._address] += 1
        if self.addresses[self._address] > self.most:
            logger.info("%s has %d connections; one more is refused", self._address, self.most)
            self._refuse(503, "Too many connections from your address; close some.")
        else:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._in_time()
        if self._address:
            self.addresses[self._address] -= 1
            if not self.addresses[self._address]:
                del self.addresses[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if not self._inside:
            self._hurry()
        self._quiet += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._quiet > HEAD_BYTES:
            self._refuse(431, "The headers are too large.")
        elif self._inside and not self._large and self.cycle.response_complete:
            self.transport.pause_reading()
            self.loop.call_later(SLOWLY_SECONDS, self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing() and not self.flow.read_paused:
            self.transport.resume_reading()

    def _expect_request(self) -> None:
        """Wait for the first byte as long as between two requests: balancers open connections in advance."""
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    # -- what the parser finds -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._quiet = 0
        self._hurry()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers, or trailers, is there."""
        super().on_header(name, value)
        if len(self.headers) > HEADERS:
            self._large = True
            raise _Refused

    def on_headers_complete(self) -> None:
        """Its headers are there."""
        self._in_time()
        self._quiet = 0
        if len(self.url) + sum([len(name) + len(value) for name, value in self.headers]) > HEAD_BYTES:
            self._large = True
            raise _Refused
        if self.parser.should_upgrade() and any(name in _BODY and value != b"0" for name, value in self.headers):
            self._why = "No body can be read after an Upgrade header: send the request without one."
            raise _Refused
        self._inside, self._pieces, self._size = True, 0, 0
        super().on_headers_complete()
        if len(self.pipeline) > PIPELINED:
            raise _Refused  # nobody can be told: an answer is under way
        if not self.parser.should_upgrade():
            self.headers = []  # for trailers; the request has its own

    def on_body(self, body: bytes) -> None:
        """A piece of its body is there."""
        self._quiet = 0
        self._pieces += 1
        self._size += len(body)
        if self._pieces > PIECES and self._size < PIECE_BYTES * self._pieces:
            self._why = "The body comes in too many small pieces: send larger ones."
            raise _Refused
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._in_time()
        self._inside, self._quiet = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It was answered."""
        super().on_response_complete()
        if self._inside and self.cycle.response_complete:
            self._hurry()  # what is left of its body

    # -- limits ----------------------------------------------------------------------------------------------------

    def _hurry(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADERS_SECONDS, self._late)

    def _in_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.flow.read_paused:
            self._hurry()  # it is not the client who is late
        elif not self.transport.is_closing():
            self._refuse(408, f"The request did not arrive within {HEADERS_SECONDS:g} s.")

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser has refused."""
        if self._large:
            self._refuse(431, "The headers are too large.")
            return
        if self.pipeline or self._answered:
            self.transport.close()  # another answer would be taken for another request's
        elif not self.transport.is_closing():
            super().send_400_response(self._why or msg)
        self._gone()

    @property
    def _answered(self) -> bool:
        """Whether the request that is arriving, or the one before it, has an answer or begins to have it."""
        if self.cycle is None:
            return False
        return self._inside if self.cycle.response_complete else self.cycle.response_started

    def _refuse(self, status: int, text: str) -> None:
        self._in_time()
        idle = self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr] # None before the first
        if idle:
            head = b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\ncontent-length: %d\r\n%s\r\n"
            again = b"retry-after: 1\r\n" if status == 503 else b""
            self.transport.write(STATUS_LINE[status] + head % (len(text), again) + text.encode())
        if idle and status == 431:
            self.transport.pause_reading()
            self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()
        self._gone()

    def _gone(self) -> None:
        """Whoever answers learns now that nobody listens, not when the connection has ended: he would answer nobody."""
        for cycle in (self.cycle, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:  # type: ignore[redundant-expr] # see above
                cycle.disconnected = True
                cycle.message_event.set()


class Proxies:
    """Addresses whose ``X-Forwarded`` headers are believed.

    Args:
        named: addresses and networks with commas between them, or ``*``.
    """

    def __init__(self, named: str) -> None:
        self._all = named.strip() == "*"
        self._networks = []
        for name in named.split(","):
            with suppress(ValueError):  # the HTTP server compares other names with what is no address either
                self._networks.append(ip_network(name.strip(), strict=False))

    def __contains__(self, host: str) -> bool:
        if self._all:
            return True
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return any(address in each for each in self._networks)


def limited(settings: Settings) -> type[LimitedProtocol]:
    """The protocol of one node's HTTP server."""
    limits = {
        "addresses": Counter(),
        "trusted": Proxies(settings.forwarded_allow_ips),
        "most": settings.max_connections,
    }
    return type("NodeProtocol", (LimitedProtocol,), limits)


def raise_file_limit() -> None:
    """Have room for connections: the usual 1,024 files are fewer than one address may have connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
