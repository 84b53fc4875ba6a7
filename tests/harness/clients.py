"""Clients: the official one, and a raw one that sends each exchange to the node that a test chooses."""

from __future__ import annotations

import asyncio
import codecs
import itertools
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpcore
import httpx
from mcp import Client
from mcp.client.session import ElicitationFnT, ListRootsFnT, LoggingFnT, MessageHandlerFnT, SamplingFnT
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

Message = dict[str, Any]
RequestId = int | str

CONNECT = 30
"""Seconds. No less: a deadline that passes just when a connection is made leaves it open, and machines can be slow."""

_LINE_END = re.compile(r"\r\n|\n|\r(?=.)", re.DOTALL)  # a carriage return at the very end may be half of \r\n


@asynccontextmanager
async def connect(
    url: str,
    *,
    mode: str = "legacy",
    headers: dict[str, str] | None = None,
    read_timeout_seconds: float | None = 30,
    elicitation_callback: ElicitationFnT | None = None,
    sampling_callback: SamplingFnT | None = None,
    list_roots_callback: ListRootsFnT | None = None,
    message_handler: MessageHandlerFnT | None = None,
    logging_callback: LoggingFnT | None = None,
) -> AsyncIterator[Client]:
    """Connect the official Python client.

    Args:
        url: the MCP endpoint.
        mode: ``legacy`` (initialize), ``auto`` (discover, then initialize) or a revision from 2026-07-28 on.
        headers: sent with every request, such as an Authorization header.
        read_timeout_seconds: how long the client waits for an answer; bounds every call of a test.
        elicitation_callback: answers forms.
        sampling_callback: answers for the language model.
        list_roots_callback: answers with roots.
        message_handler: sees every notification.
        logging_callback: sees log messages.
    """
    async with (
        create_mcp_http_client(headers=headers) as http,
        Client(
            streamable_http_client(url, http_client=http),
            mode=mode,
            read_timeout_seconds=read_timeout_seconds,
            elicitation_callback=elicitation_callback,
            sampling_callback=sampling_callback,
            list_roots_callback=list_roots_callback,
            message_handler=message_handler,
            logging_callback=logging_callback,
            cache=None,
        ) as client,
    ):
        yield client


@dataclass(frozen=True)
class SseEvent:
    """One block of an event stream; fields that were not sent are None."""

    id: str | None = None
    data: str | None = None
    event: str | None = None
    retry: int | None = None

    @property
    def is_priming(self) -> bool:
        """Whether this only gives the client an id to resume from."""
        return self.id is not None and not self.data

    @property
    def message(self) -> Message | None:
        """The JSON-RPC message that it carries."""
        return json.loads(self.data) if self.data else None


class SseParser:
    """Turns pieces of an event stream, cut anywhere, into events; counts comments."""

    def __init__(self) -> None:
        self.comments = 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._rest = [""]
        self._fields: dict[str, Any] = {}

    def feed(self, piece: bytes) -> list[SseEvent]:
        """Return the events that this piece completes."""
        self._rest.append(self._decode(piece))
        if "\n" not in self._rest[-1] and "\r" not in self._rest[-1] and not self._rest[0].endswith("\r"):
            return []  # a long line is joined once
        *lines, rest = _LINE_END.split("".join(self._rest))
        self._rest = [rest]
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: str) -> SseEvent | None:
        if not line:
            fields, self._fields = self._fields, {}
            return SseEvent(**fields) if fields else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments += 1
        elif name == "data" and "data" in self._fields:
            self._fields["data"] += f"\n{value}"
        elif name == "retry":
            self._fields["retry"] = int(value)
        elif name in {"data", "id", "event"}:
            self._fields[name] = value
        return None


class RawExchange:
    """One HTTP exchange: its status and headers, then its body or, while they arrive, its events.

    A task of its own reads the stream, so that a test may wait in vain for an event and go on with the same stream.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.request_body = response.request.content
        self.is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        self.body = b""
        self.seen: list[SseEvent] = []
        self.error: httpx.HTTPError | None = None
        """What broke the stream; None as long as it runs and after a clean end."""
        self._response = response
        self._parser = SseParser()
        self._arrived: asyncio.Queue[SseEvent | None] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None

    async def begin(self) -> Self:
        """Read the body, or start to read the stream."""
        if self.is_stream:
            self._reader = asyncio.create_task(self._read())
        else:
            self.body = await self._response.aread()
            await self._response.aclose()
        return self

    @property
    def comments(self) -> int:
        """How many comments (keep-alives) have arrived."""
        return self._parser.comments

    @property
    def last_event_id(self) -> str | None:
        """The id to resume from, by what the test has taken from the stream."""
        return next((event.id for event in reversed(self.seen) if event.id is not None), None)

    @property
    def messages(self) -> list[Message]:
        """The JSON-RPC messages that the test has taken from the stream."""
        return [message for event in self.seen if (message := event.message) is not None]

    def json(self) -> Any:
        """Return the body of an exchange that is no stream."""
        assert not self.is_stream, "this exchange is a stream"
        return json.loads(self.body)

    async def next(self, timeout: float = 10) -> SseEvent | None:
        """Return the next event; None at the end of the stream, clean or not (see ``error``).

        Raises:
            TimeoutError: nothing came; the stream is still open.
        """
        assert self.is_stream, f"no stream: {self.status} {self.body!r}"
        event = await asyncio.wait_for(self._arrived.get(), timeout)
        if event is None:
            self._arrived.put_nowait(None)
        else:
            self.seen.append(event)
        return event

    async def event(self, timeout: float = 10) -> SseEvent:
        """Return the next event, which has to come."""
        event = await self.next(timeout)
        assert event is not None, f"the stream ended ({self.error or 'cleanly'})"
        return event

    async def rest(self, timeout: float = 10) -> list[SseEvent]:
        """Read to the end of the stream and return what came."""
        before = len(self.seen)
        async with asyncio.timeout(timeout):
            while await self.next(timeout) is not None:
                pass
        return self.seen[before:]

    async def message(self, method: str, timeout: float = 10) -> Message:
        """Take events up to the first request or notification with this method, and return it."""
        return await self._first(lambda message: message.get("method") == method, timeout)

    async def response(self, request_id: RequestId, timeout: float = 10) -> Message:
        """Return the JSON-RPC response to a request, from the stream or the body."""
        if not self.is_stream:
            return dict(self.json())
        return await self._first(lambda message: "method" not in message and message.get("id") == request_id, timeout)

    async def close(self) -> None:
        """Hang up."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _first(self, wanted: Any, timeout: float) -> Message:
        async with asyncio.timeout(timeout):
            while (event := await self.next(timeout)) is not None:
                if (message := event.message) is not None and wanted(message):
                    return message
        raise AssertionError(f"the stream ended ({self.error or 'cleanly'}) after {self.messages}")

    async def _read(self) -> None:
        try:
            async for piece in self._response.aiter_raw():
                for event in self._parser.feed(piece):
                    self._arrived.put_nowait(event)
        except httpx.HTTPError as error:
            self.error = error
        finally:
            self._arrived.put_nowait(None)


class _Wire(httpcore.AsyncNetworkBackend):
    """Connects, and closes what the client has lost in the end: a connection that breaks in an unlucky moment."""

    def __init__(self) -> None:
        self._backend = httpcore.AnyIOBackend()
        self._streams: list[httpcore.AsyncNetworkStream] = []

    def transport(self) -> httpx.AsyncHTTPTransport:
        """What a client speaks through; no TLS, and reading the system's certificates takes longer than a call."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        made = httpx.AsyncHTTPTransport(verify=False, trust_env=False, limits=limits)
        made._pool._network_backend = self
        return made

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        """See ``httpcore.AsyncNetworkBackend``."""
        stream = await self._backend.connect_tcp(*args, **kwargs)
        self._streams.append(stream)
        return stream

    async def sleep(self, seconds: float) -> None:
        """See ``httpcore.AsyncNetworkBackend``."""
        await self._backend.sleep(seconds)

    async def close(self) -> None:
        """Close every connection."""
        for stream in self._streams:
            await stream.aclose()


class RawSession:
    """One MCP session spoken by hand; ``base`` (``http://127.0.0.1:PORT``) chooses the node of every exchange."""

    def __init__(
        self,
        *,
        protocol_version: str = "2025-11-25",
        capabilities: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        path: str = "/mcp",
    ) -> None:
        self.protocol_version = protocol_version
        self.capabilities = dict(capabilities or {})
        self.client_info: dict[str, Any] = {"name": "raw", "version": "1"}
        self.path = path
        self.session_id: str | None = None
        self._ids = itertools.count(1)
        self._exchanges: list[RawExchange] = []
        self._wire = _Wire()
        self.http = httpx.AsyncClient(
            headers=dict(headers or {}),
            timeout=httpx.Timeout(10, read=None, connect=CONNECT),
            transport=self._wire.transport(),
            trust_env=False,
        )

    def next_id(self) -> int:
        """Return a request id that was not used before."""
        return next(self._ids)

    async def open(self, base: str, initialized_base: str | None = None) -> Message:
        """Do the whole handshake and return the InitializeResult; its second half may go to another node."""
        exchange = await self.initialize(base)
        assert exchange.status == 200, f"{exchange.status} {exchange.body!r}"
        answer = await exchange.response(0)
        await exchange.close()
        accepted = await self.notify(initialized_base or base, "notifications/initialized")
        assert accepted.status == 202, f"{accepted.status} {accepted.body!r}"
        return dict(answer["result"])

    async def initialize(self, base: str) -> RawExchange:
        """POST ``initialize`` (id 0) and remember the session id."""
        params = {
            "protocolVersion": self.protocol_version,
            "capabilities": self.capabilities,
            "clientInfo": self.client_info,
        }
        exchange = await self.post(base, {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
        self.session_id = exchange.headers.get("mcp-session-id")
        return exchange

    async def request(
        self,
        base: str,
        method: str,
        params: Mapping[str, Any] | None = None,
        *,
        request_id: RequestId | None = None,
    ) -> RawExchange:
        """POST a request and return the exchange as soon as its headers are there."""
        return await self.post(base, _message(method, params, id=self.next_id() if request_id is None else request_id))

    async def call(
        self, base: str, method: str, params: Mapping[str, Any] | None = None, *, timeout: float = 10
    ) -> Message:
        """POST a request, wait for its response and return that."""
        request_id = self.next_id()
        async with await self.request(base, method, params, request_id=request_id) as exchange:
            assert exchange.status == 200, f"{exchange.status} {exchange.body!r}"
            return await exchange.response(request_id, timeout)

    async def call_tool(self, base: str, name: str, timeout: float = 10, /, **arguments: Any) -> Message:
        """Call a tool and return its result, or fail with the error."""
        answer = await self.call(base, "tools/call", {"name": name, "arguments": arguments}, timeout=timeout)
        assert "result" in answer, answer
        return dict(answer["result"])

    async def notify(self, base: str, method: str, params: Mapping[str, Any] | None = None) -> RawExchange:
        """POST a notification."""
        return await self.post(base, _message(method, params))

    async def answer(self, base: str, request: Message, result: Mapping[str, Any]) -> RawExchange:
        """POST the result of a request that the server made."""
        return await self.post(base, {"jsonrpc": "2.0", "id": request["id"], "result": dict(result)})

    async def post(self, base: str, message: Any, *, headers: Mapping[str, str] | None = None) -> RawExchange:
        """POST any JSON (or raw bytes)."""
        content = message if isinstance(message, bytes) else json.dumps(message).encode()
        accept = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
        return await self._send("POST", base, {**accept, **(headers or {})}, content)

    async def get(
        self, base: str, last_event_id: str | None = None, *, headers: Mapping[str, str] | None = None
    ) -> RawExchange:
        """GET the standalone stream, or resume the stream that the event id belongs to."""
        resume = {} if last_event_id is None else {"last-event-id": last_event_id}
        return await self._send("GET", base, {"accept": "text/event-stream", **resume, **(headers or {})})

    async def delete(self, base: str) -> RawExchange:
        """DELETE the session."""
        return await self._send("DELETE", base, {})

    async def close(self) -> None:
        """Hang up on every exchange; the session itself is not ended."""
        for exchange in self._exchanges:
            await exchange.close()
        await self.http.aclose()
        await self._wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(
        self, verb: str, base: str, headers: Mapping[str, str], content: bytes | None = None
    ) -> RawExchange:
        session = {} if self.session_id is None else {"mcp-session-id": self.session_id}
        if session and self.protocol_version >= "2025-06-18":
            session["mcp-protocol-version"] = self.protocol_version
        request = self.http.build_request(verb, f"{base}{self.path}", headers={**session, **headers}, content=content)
        exchange = await RawExchange(await self.http.send(request, stream=True)).begin()
        if exchange.is_stream:
            self._exchanges.append(exchange)
        return exchange


def _message(method: str, params: Mapping[str, Any] | None, **more: Any) -> Message:
    message: Message = {"jsonrpc": "2.0", **more, "method": method}
    return message if params is None else {**message, "params": dict(params)}
