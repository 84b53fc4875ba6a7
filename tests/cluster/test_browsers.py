"""Scripts of web pages: what a browser does to their requests is done here, between the official client and a node.

As MCP Inspector in its direct mode: ``initialize``, the standalone stream, calls, DELETE, and looking for the
authorization server, each from a page of another origin.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer

from tests.harness.cluster import RunningNode, cluster

INSPECTOR, EVIL = "http://localhost:6274", "http://evil.example"
METADATA = "/.well-known/oauth-protected-resource/mcp"
SAFE = {"accept", "accept-language", "content-language"}
READABLE = {"cache-control", "content-language", "content-length", "content-type", "expires", "last-modified", "pragma"}
ITS_OWN = {"accept-encoding", "connection", "content-length", "host", "origin", "user-agent"}


class Blocked(Exception):
    """The page gets a TypeError: "Failed to fetch"."""


class Browser(httpx2.AsyncBaseTransport):
    """The CORS protocol of the Fetch standard, for a page of one origin."""

    def __init__(self, origin: str) -> None:
        self._origin, self._net, self.asked = origin, httpx2.AsyncHTTPTransport(verify=False), set[str]()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        names = {name.lower() for name in request.headers} - ITS_OWN - SAFE
        if request.headers.get("content-type", "text/plain") == "text/plain":
            names.discard("content-type")
        if names or request.method not in {"GET", "HEAD", "POST"}:
            await self._preflight(request, names)
        request.headers["origin"] = self._origin
        response = await self._net.handle_async_request(request)
        if response.headers.get("access-control-allow-origin") not in {self._origin, "*"}:
            await response.aclose()
            raise Blocked(f"{request.method} {request.url.path}: {response.status_code}")
        exposed = words(response, "expose-headers") | READABLE
        response.headers = httpx2.Headers([pair for pair in response.headers.items() if pair[0].lower() in exposed])
        return response

    async def _preflight(self, request: httpx2.Request, names: set[str]) -> None:
        self.asked |= names
        headers = {
            "access-control-request-method": request.method,
            "origin": self._origin,
            "host": request.headers["host"],
        }
        if names:
            headers["access-control-request-headers"] = ",".join(sorted(names))
        answer = await self._net.handle_async_request(httpx2.Request("OPTIONS", request.url, headers=headers))
        await answer.aread()
        missing = names - words(answer, "allow-headers")
        allowed = answer.headers.get("access-control-allow-origin") in {self._origin, "*"}
        method = request.method.lower() in words(answer, "allow-methods") | {"get", "post"}
        if not (answer.is_success and allowed and method and not missing):
            raise Blocked(f"preflight of {request.method} {request.url.path}: {answer.status_code} {missing}")

    async def aclose(self) -> None:
        await self._net.aclose()


def words(response: httpx2.Response, name: str) -> set[str]:
    found = response.headers.get(f"access-control-{name}", "")
    return {word.strip().lower() for word in found.split(",") if word.strip()}


class Verifier:
    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="c", scopes=["use"]) if token == "known" else None


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def private() -> MCPServer:
    auth = {"issuer_url": "https://issuer.example", "resource_server_url": "https://mcp.example/mcp"}
    checks: dict[str, Any] = {"required_scopes": ["use"], "validate_token_resource": False}
    server = MCPServer("private", token_verifier=Verifier(), auth=AuthSettings.model_validate({**auth, **checks}))
    server.add_tool(add)
    return server


@contextlib.asynccontextmanager
async def page(origin: str) -> AsyncIterator[tuple[httpx2.AsyncClient, Browser]]:
    browser = Browser(origin)
    async with httpx2.AsyncClient(transport=browser, headers={"authorization": "Bearer known"}) as http:
        yield http, browser


@pytest.fixture
async def node(database: str) -> AsyncIterator[RunningNode]:
    async with cluster(database, private, 1, cors_origins=("http://localhost:*", "https://app.example")) as [node]:
        yield node


async def test_a_listed_page_connects_and_others_do_not(node: RunningNode) -> None:
    url = f"{node.url}/mcp"
    for mode in ("legacy", "auto"):
        async with page(INSPECTOR) as (http, browser):
            async with Client(streamable_http_client(url, http_client=http), mode=mode, cache=None) as client:
                result = await client.call_tool("add", {"a": 1, "b": 2})
                assert result.structured_content == {"result": 3}
            assert {"authorization", "content-type", "mcp-protocol-version"} <= browser.asked
            assert ("mcp-session-id" in browser.asked) is (mode == "legacy")

    initialize = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}}
    headers = {"accept": "application/json, text/event-stream", "x-custom": "1"}
    async with page(INSPECTOR) as (http, _):
        refused = await http.post(url, json=initialize, headers={**headers, "authorization": "Bearer unknown"})
        assert refused.status_code == 401
        assert METADATA in refused.headers["www-authenticate"]
        found = await http.get(f"{node.url}{METADATA}", headers={"mcp-protocol-version": "2025-11-25"})
        assert found.json()["authorization_servers"]
    async with page(EVIL) as (http, _):
        with pytest.raises(Blocked, match="preflight"):
            await http.post(url, json=initialize, headers=headers)
        del http.headers["authorization"]
        with pytest.raises(Blocked, match="POST /mcp: 401"):
            await http.post(url, content="{}", headers={"content-type": "text/plain"})
        # Anybody may read it, says the SDK; what is not listed here goes on to where it says so.
        found = await http.get(f"{node.url}{METADATA}", headers={"mcp-protocol-version": "2025-11-25"})
        assert found.status_code == 200
    async with httpx2.AsyncClient() as straight:  # what a cache keeps of others is not for a listed page
        assert (await straight.get(f"{node.url}/livez")).headers["vary"] == "Origin"


async def test_without_the_setting_no_page_of_another_origin_connects(database: str) -> None:
    async with cluster(database, private, 1, allowed_origins=(INSPECTOR,)) as [node], page(INSPECTOR) as (http, _):
        with pytest.raises(Blocked, match="preflight"):
            await http.post(f"{node.url}/mcp", json={})


async def test_any_page_may_be_let_in_but_none_into_the_network_behind(database: str) -> None:
    async with cluster(database, private, 1, cors_origins=("*",)) as [node], page(EVIL) as (http, _):
        assert (await http.post(f"{node.url}/mcp", json={}, headers={"accept": "text/html"})).status_code == 406
        private_network = {"access-control-request-private-network": "true", "origin": EVIL}
        async with httpx2.AsyncClient(verify=False) as straight:
            wanted = {"access-control-request-method": "POST", **private_network}
            assert (await straight.options(f"{node.url}/mcp", headers=wanted)).status_code == 400
