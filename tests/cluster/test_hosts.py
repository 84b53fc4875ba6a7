"""Host and Origin: each list is a rule by itself, in both eras; and a node without any says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.requests import Request

from pgmcp.settings import Settings
from pgmcp.web.hosts import host_rules, unprotected
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything
from tests.harness.modern import Modern

EVIL, APP = "http://evil.example", "https://app.example"


@pytest.mark.parametrize(
    ("settings", "host", "origin", "status"),
    [
        ({"host": "0.0.0.0", "allowed_origins": "https://app.example"}, "any.example", APP, None),
        ({"host": "0.0.0.0", "allowed_origins": "https://app.example"}, "any.example", "", None),
        ({"host": "0.0.0.0", "allowed_origins": "https://app.example"}, "any.example", EVIL, 403),
        ({"host": "0.0.0.0", "allowed_hosts": "mcp.example"}, "mcp.example", "", None),
        ({"host": "0.0.0.0", "allowed_hosts": "mcp.example"}, "evil.example", "", 421),
        ({"host": "0.0.0.0", "allowed_hosts": "mcp.example"}, "", "", 421),
        ({"host": "0.0.0.0", "allowed_hosts": "mcp.example"}, "mcp.example", APP, 403),
        ({"host": "0.0.0.0", "allowed_hosts": "a.example:*", "allowed_origins": APP}, "a.example:81", APP, None),
        ({"host": "0.0.0.0", "allowed_hosts": "a.example:*", "allowed_origins": APP}, "a.example", APP, 421),
        ({"host": "0.0.0.0"}, "evil.example", EVIL, None),
        ({}, "localhost:8000", "http://localhost:3000", None),
        ({}, "evil.example", "", 421),
        ({}, "127.0.0.1", "null", 403),
        ({"allowed_origins": APP}, "evil.example", APP, 421),
        ({"allowed_hosts": "mcp.example"}, "mcp.example", "http://localhost", None),
        ({"allowed_hosts": "mcp.example"}, "mcp.example", EVIL, 403),
        ({"cors_origins": APP}, "localhost:8000", APP, None),
        ({"cors_origins": APP}, "localhost:8000", "http://localhost:3000", None),
        ({"cors_origins": APP}, "localhost:8000", EVIL, 403),
        ({"cors_origins": "*"}, "localhost:8000", EVIL, None),
        ({"cors_origins": "*"}, "evil.example", EVIL, 421),
        ({"cors_origins": "http://localhost:*"}, "localhost:1", "http://localhost:80.evil.example", 403),
        ({}, "localhost:80.evil.example", "", 421),
        ({"host": "0.0.0.0", "cors_origins": APP}, "any.example", EVIL, 403),
        ({"host": "0.0.0.0", "cors_origins": APP}, "any.example", APP, None),
    ],
)
async def test_each_list_is_a_rule(settings: dict[str, Any], host: str, origin: str, status: int | None) -> None:
    sent = [(b"content-type", b"application/json")]
    sent += [(name, value.encode()) for name, value in ((b"host", host), (b"origin", origin)) if value]
    request = Request({"type": "http", "method": "POST", "headers": sent})
    refused = await host_rules(Settings(**settings)).validate_request(request, is_post=True)
    assert (refused and refused.status_code) == status


def test_only_a_node_on_a_public_address_without_lists_is_unprotected() -> None:
    assert unprotected(Settings()) is None
    assert unprotected(Settings(host="0.0.0.0", allowed_hosts="a")) is None
    assert unprotected(Settings(host="0.0.0.0", allowed_origins="a")) is None
    assert unprotected(Settings(host="0.0.0.0", cors_origins="a")) is None
    assert unprotected(Settings(cors_origins="http://localhost:*")) is None
    assert "any web page that somebody on this machine opens" in str(unprotected(Settings(cors_origins="*")))
    assert unprotected(Settings(host="0.0.0.0", cors_origins="*")) is not None
    assert "0.0.0.0" in (unprotected(Settings(host="0.0.0.0")) or "")


async def test_foreign_pages_are_refused_where_only_origins_are_listed(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"host": "0.0.0.0", "allowed_origins": (APP,)}
    async with cluster(database, everything, 1, **settings) as [node], RawSession() as session, Modern() as client:
        await session.open(node.url)
        message = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        for origin, status in ((EVIL, 403), (APP, 200)):
            headers = {"origin": origin, "host": "any.example"}
            assert (await session.post(node.url, message, headers=headers)).status == status
            assert (await client.request(node.url, "server/discover", headers=headers)).status == status
            async with RawSession(path="/sse") as older:
                assert (await older.get(node.url, headers=headers)).status == status
    assert "evil.example" not in caplog.text


async def test_a_node_that_answers_to_everybody_says_so_once(database: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with cluster(database, everything, 1, host="0.0.0.0"):
        pass
    async with cluster(database, everything, 1):
        pass
    said = [record.getMessage() for record in caplog.records if "--allowed-hosts" in record.getMessage()]
    assert len(said) == 1
