"""The entry port of a local cluster: hands every request to the next live node in turn. For local use only.

Invariants:
    * Nothing is kept: request and response bodies pass chunk by chunk, and no read has a time limit (streams).
    * A request goes to another node only if the first one refused the connection, so before anything was sent.
    * A node that is silent (its ``/livez`` has not answered within a second: frozen, or cut off) gets no request
      while another one answers. Its exchanges are broken off when it stays silent, since they would hang for as
      long as it does: clients resume what had begun on another node, and are told of what had not.
    * A side that breaks off breaks the other one off: a client that leaves is noticed by the node, and a stream
      that its node cut short has no clean end for the client either.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.types import Message, Receive, Scope, Send

from pgmcp.clock import Clock
from pgmcp.protocol import HEADER_PREFIX, LAST_EVENT_ID_HEADER

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"expect",  # uvicorn has answered it
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
FOR_THE_NODE = frozenset(
    {
        b"authorization",
        b"content-length",
        b"content-type",
        b"cookie",
        b"forwarded",
        b"host",
        LAST_EVENT_ID_HEADER.encode(),
        b"origin",
    }
)
"""What nodes decide by, beside ``X-Forwarded-`` and ``Mcp-``: no ``Connection`` takes it away (RFC 9110 section 7.6.1
leaves no client the right to name what is meant for all recipients)."""
TIMEOUTS = {"connect": 5.0, "read": None, "write": None, "pool": None}  # seconds
LOOK_SECONDS = 0.5  # seconds between two looks at a node
ANSWER_SECONDS = 1.0  # seconds within which a node answers that it lives
LOOKS_IN_VAIN = 3  # looks in vain after which a node's exchanges are broken off

Headers = list[tuple[bytes, bytes]]


class RoundRobinProxy:
    """An ASGI application that spreads requests over nodes.

    Args:
        nodes: the nodes' names and TCP ports on 127.0.0.1; ``drop`` takes one out for good.
        report: is told in one line which node fell silent, and which one answers again.
    """

    def __init__(self, nodes: dict[str, int], clock: Clock, report: Callable[[str], None]) -> None:
        self._nodes, self._clock, self._report = dict(nodes), clock, report
        self._turn = 0
        self._silent: set[str] = set()
        self._exchanges: dict[str, set[asyncio.Timeout]] = {name: set() for name in nodes}
        self.taken: Counter[str] = Counter()
        """How many requests each node has taken."""
        # Each request has a connection of its own: one that is kept open might be closed just as it is used,
        # and then nobody could tell whether the node had read the request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._upstream = httpx.AsyncHTTPTransport(verify=False, trust_env=False, limits=limits)

    @property
    def silent(self) -> frozenset[str]:
        """The nodes that get no requests, because they do not answer."""
        return frozenset(self._silent)

    def drop(self, name: str) -> None:
        """Send nothing to this node any more."""
        self._nodes.pop(name, None)
        self._silent.discard(name)

    async def watch(self) -> None:
        """Look again and again whether the nodes answer, until cancelled."""
        await asyncio.gather(*(self._watch(name, port) for name, port in list(self._nodes.items())))
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        """Close all connections to nodes."""
        await self._upstream.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] != "http":
            return
        body = _Body(receive)
        relay = asyncio.ensure_future(self._relay(scope, body, send))
        watch = asyncio.ensure_future(body.wait_for_disconnect())
        try:
            await asyncio.wait({relay, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not watch.done():
                relay.result()
        finally:
            relay.cancel()
            watch.cancel()
            await asyncio.gather(relay, watch, return_exceptions=True)

    async def _relay(self, scope: Scope, body: _Body, send: Send) -> None:
        for name, port in self._in_turn():
            if await self._through(name, _request(scope, body, port), send):
                return
        await _refuse(send, "No node takes connections.")

    def _in_turn(self) -> list[tuple[str, int]]:
        """The nodes in the order in which they are asked; silent ones only if all are."""
        nodes = [node for node in self._nodes.items() if node[0] not in self._silent] or list(self._nodes.items())
        start = self._turn % len(nodes) if nodes else 0
        self._turn += 1
        return nodes[start:] + nodes[:start]

    async def _through(self, name: str, request: httpx.Request, send: Send) -> bool:
        """Carry an exchange with this node; False if it refuses the connection."""
        try:
            async with self._breakable(name):
                response = await self._upstream.handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return False
        except (httpx.TransportError, TimeoutError) as error:
            reason = f"The node broke off before it answered; it may have acted ({str(error) or type(error).__name__})."
            await _refuse(send, reason)
            return True
        self.taken[name] += 1
        try:
            # An error from here on leaves the response unfinished, and the server then closes the connection.
            headers = end_to_end(response.headers.raw)
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async with self._breakable(name):
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await response.aclose()
        return True

    @asynccontextmanager
    async def _breakable(self, name: str) -> AsyncIterator[None]:
        """What is awaited inside ends with TimeoutError when the node stays silent."""
        async with asyncio.timeout(None) as exchange:
            self._exchanges[name].add(exchange)
            try:
                yield
            finally:
                self._exchanges[name].discard(exchange)

    async def _watch(self, name: str, port: int) -> None:
        in_vain = 0
        while name in self._nodes:
            if await self._answers(port):
                in_vain = 0
                if name in self._silent:
                    self._silent.discard(name)
                    self._report(f"{name} answers again and gets its share of requests")
            elif name in self._nodes:
                in_vain += 1
                if name not in self._silent:
                    self._silent.add(name)
                    self._report(f"{name} does not answer and gets no requests")
                if in_vain >= LOOKS_IN_VAIN:
                    self._break_off(name)
            await self._clock.sleep(LOOK_SECONDS)

    async def _answers(self, port: int) -> bool:
        """Whether the node says that it lives; one that refuses the connection does answer, and is not asked."""
        extensions = {"timeout": dict.fromkeys(TIMEOUTS, ANSWER_SECONDS)}
        request = httpx.Request("GET", f"http://127.0.0.1:{port}/livez", extensions=extensions)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                response = await self._upstream.handle_async_request(request)
                await response.aclose()
        except httpx.ConnectError:
            return True
        except (httpx.TransportError, TimeoutError):
            return False
        return True

    def _break_off(self, name: str) -> None:
        for exchange in self._exchanges[name]:
            if not exchange.expired():
                exchange.reschedule(0)


class _ClientLeftError(Exception):
    """The client left in the middle of its request: the node must not take what there is for the whole."""


class _Body(httpx.AsyncByteStream):
    """The request's body as it arrives; afterwards, the wait for the client to leave."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read = asyncio.Event()
        self._gone = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self._read.is_set():
            message = await self._next()
            if self._gone.is_set():
                raise _ClientLeftError
            if chunk := message.get("body", b""):
                yield chunk

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone.set()
        if not message.get("more_body"):
            self._read.set()
        return message

    async def wait_for_disconnect(self) -> None:
        """Return when the client has left; while the body arrives, only its reader may receive."""
        await self._read.wait()
        while not self._gone.is_set():
            await self._next()


def _request(scope: Scope, body: _Body, port: int) -> httpx.Request:
    query = scope["query_string"]
    target = scope.get("raw_path") or scope["path"].encode()
    headers = end_to_end(scope["headers"])
    if not any(name == b"host" for name, _ in headers):  # HTTP/1.0
        headers.append((b"host", b"127.0.0.1"))
    if any(name == b"transfer-encoding" for name, _ in scope["headers"]):
        headers.append((b"transfer-encoding", b"chunked"))
    extensions: dict[str, Any] = {"timeout": TIMEOUTS, "target": target + (b"?" + query if query else b"")}
    url = f"http://127.0.0.1:{port}/"
    return httpx.Request(scope["method"], url, headers=headers, stream=body, extensions=extensions)


def end_to_end(headers: Headers) -> Headers:
    """The headers that are meant for the other end; blanks around a value are not part of it."""
    named = b",".join(value for name, value in headers if name.lower() == b"connection").lower().split(b",")
    dropped = HOP_BY_HOP.union(word for word in map(bytes.strip, named) if not _for_the_node(word))
    return [(name, value.strip()) for name, value in headers if name.lower() not in dropped]


def _for_the_node(name: bytes) -> bool:
    return name in FOR_THE_NODE or name.startswith((b"x-forwarded-", HEADER_PREFIX.encode()))


async def _refuse(send: Send, reason: str) -> None:
    content = json.dumps({"error": "bad_gateway", "message": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 502, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": False})
