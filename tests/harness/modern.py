"""2026-07-28 spoken by hand: every exchange goes to the node that the test chooses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from tests.harness.clients import Message, RawExchange

VERSION = "2026-07-28"
NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
ACCEPT = "application/json, text/event-stream"


def asked(
    method: str, params: Mapping[str, Any] | None = None, *, rpc_id: int | str = 1, version: str = VERSION
) -> tuple[dict[str, str], Message]:
    """The headers and the body of a request."""
    meta: dict[str, Any] = {
        "io.modelcontextprotocol/protocolVersion": version,
        "io.modelcontextprotocol/clientCapabilities": {"elicitation": {"form": {}}},
        "progressToken": rpc_id,
    }
    body = {"jsonrpc": "2.0", "id": rpc_id, "method": method, "params": {**(params or {}), "_meta": meta}}
    headers = {"mcp-protocol-version": version, "mcp-method": method}
    if method in NAMED:
        headers["mcp-name"] = str((params or {})[NAMED[method]])
    return headers, body


def wire(base: str, method: str, params: Mapping[str, Any] | None = None, *, pad: str = "") -> tuple[bytes, bytes]:
    """Head and body of a request as bytes, for tests that have the connection in hand; ``pad`` goes around values."""
    headers, body = asked(method, params)
    text = json.dumps(body).encode()
    common = {"host": urlsplit(base).netloc, "accept": ACCEPT, "content-type": "application/json"}
    lines = [f"{name}: {value}" for name, value in {**common, "content-length": str(len(text))}.items()]
    lines += [f"{name}: {pad}{value}{pad}" for name, value in headers.items()]
    return "\r\n".join(["POST /mcp HTTP/1.1", *lines, "", ""]).encode(), text


class Modern:
    """A client without sessions."""

    def __init__(self, headers: Mapping[str, str] | None = None) -> None:
        self._ids = itertools.count(1)
        self._exchanges: list[RawExchange] = []
        self._http = httpx.AsyncClient(
            verify=False,  # no TLS here, and reading the system's certificates takes longer than a call
            headers=dict(headers or {}),
            timeout=httpx.Timeout(10, read=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=False,
        )

    async def request(
        self,
        base: str,
        method: str,
        params: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        version: str = VERSION,
    ) -> RawExchange:
        """POST a request and return the exchange as soon as its headers are there."""
        named, body = asked(method, params, rpc_id=next(self._ids), version=version)
        common = {"accept": ACCEPT, "content-type": "application/json"}
        return await self.send("POST", base, {**common, **named, **(headers or {})}, json.dumps(body).encode())

    async def call(self, base: str, method: str, params: Mapping[str, Any] | None = None) -> Message:
        """POST a request and return its JSON-RPC response."""
        async with await self.request(base, method, params) as exchange:
            return await exchange.response(json.loads(exchange.request_body)["id"])

    async def tool(self, base: str, name: str, /, **arguments: Any) -> RawExchange:
        """Call a tool and return the exchange."""
        return await self.request(base, "tools/call", {"name": name, "arguments": arguments})

    async def result(self, base: str, name: str, /, **arguments: Any) -> Message:
        """Call a tool and return its result."""
        answer = await self.call(base, "tools/call", {"name": name, "arguments": arguments})
        assert "result" in answer, answer
        return dict(answer["result"])

    async def send(self, verb: str, base: str, headers: Mapping[str, str], content: bytes | None = None) -> RawExchange:
        """Send anything."""
        request = self._http.build_request(verb, f"{base}/mcp", headers=dict(headers), content=content)
        exchange = await RawExchange(await self._http.send(request, stream=True)).begin()
        if exchange.is_stream:
            self._exchanges.append(exchange)
        return exchange

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for exchange in self._exchanges:
            await exchange.close()
        await self._http.aclose()
