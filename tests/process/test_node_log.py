"""What clients send never reaches a node's log: markers in everything that they can say, and each library at DEBUG."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.clients import RawSession
from tests.harness.modern import Modern
from tests.harness.processes import NodeProcess, free_ports
from tests.harness.waiting import wait_until

MARK = "m4rk3r"
EVIL = f"{MARK}\r\n2026-01-01 00:00:00,000 ERROR root: forged {MARK}\x1b[31m\u2028"
REVISIONS = ("2025-03-26", "2025-06-18", "2025-11-25")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+: ")
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ASKED: list[tuple[str, Any]] = [
    ("tools/call", {"name": EVIL, "arguments": {EVIL: EVIL}}),
    ("tools/call", {"name": "breaks", "arguments": {"text": EVIL}}),
    ("tools/call", {"name": "tells", "arguments": {"text": EVIL}, "_meta": {"progressToken": EVIL}}),
    ("tools/call", {"name": "sells", "arguments": {"text": "bread", "count": EVIL, EVIL: EVIL}}),
    ("tools/call", {"name": [EVIL], "arguments": EVIL}),
    ("prompts/get", {"name": EVIL}),
    ("prompts/get", {"name": "greets", "arguments": {"name": EVIL, EVIL: EVIL}}),
    ("prompts/get", {"name": "greets", "arguments": {EVIL: [EVIL]}}),
    ("resources/read", {"uri": EVIL}),
    ("resources/read", {"uri": f"note://{MARK}"}),
    ("resources/subscribe", {"uri": f"note://{MARK}"}),
    ("completion/complete", {"ref": {"type": "ref/prompt", "name": EVIL}, "argument": {"name": EVIL, "value": EVIL}}),
    ("completion/complete", {"ref": {"type": EVIL}, "argument": EVIL}),
    ("logging/setLevel", {"level": EVIL}),
    ("tools/list", {"cursor": EVIL}),
    ("tasks/get", {"taskId": EVIL}),
    (EVIL, {EVIL: EVIL}),
]
SAID: list[tuple[str, Any]] = [
    ("notifications/cancelled", {"requestId": EVIL, "reason": EVIL}),
    ("notifications/progress", {"progressToken": EVIL, "progress": EVIL}),
    ("notifications/roots/list_changed", EVIL),
    (EVIL, {EVIL: EVIL}),
]
HEADERS = {
    "user-agent": MARK,
    "x-anything": MARK,
    "authorization": f"Bearer {MARK}",
    "cookie": f"pgmcp_node={MARK}",
    "accept-language": MARK,
}


@pytest.fixture(params=["sdk", "fast"])
def node(request: pytest.FixtureRequest, database: str, tmp_path: Path) -> Iterator[NodeProcess]:
    [port] = free_ports(1)
    style = "text" if request.param == "sdk" else "json"
    with NodeProcess(
        f"tests/harness/loud.py:{request.param}",
        database_url=database,
        name="n1",
        port=port,
        log_dir=tmp_path,
        env={"PGMCP_LOG_FORMAT": style},
    ) as started:
        yield started


async def drained(exchange: Any) -> None:
    if exchange.is_stream:
        await exchange.rest()
    await exchange.close()


async def session(node: NodeProcess, revision: str) -> None:
    client = RawSession(protocol_version=revision, headers=HEADERS, capabilities={"elicitation": {}, EVIL: {EVIL: 1}})
    client.client_info = {"name": EVIL, "version": EVIL, "title": EVIL}
    async with client:
        await client.open(node.url)
        for number, (method, params) in enumerate(ASKED):
            await drained(
                await client.request(
                    node.url, method, params if isinstance(params, dict) else {}, request_id=f"{number}{EVIL}"
                )
            )
        for method, params in SAID:
            body = {"jsonrpc": "2.0", "method": method, "params": params}
            await drained(await client.post(node.url, body))
        for raw in (
            b"{" + EVIL.encode(),
            b'{"jsonrpc": "2.0", "id": {"%s": 1}}' % MARK.encode(),
            b'"%s"' % MARK.encode(),
        ):
            await drained(await client.post(node.url, raw))
        for content in ({"age": EVIL}, {EVIL: EVIL}, EVIL):
            async with await client.request(node.url, "tools/call", {"name": "asks", "arguments": {}}) as asking:
                question = await asking.message("elicitation/create")
                await drained(await client.answer(node.url, question, {"action": "accept", "content": content}))
                await asking.rest()
        for answer in (
            {"jsonrpc": "2.0", "id": EVIL, "result": {EVIL: EVIL}},
            {"jsonrpc": "2.0", "id": 1 << 40, "error": {"code": 1, "message": EVIL}},
        ):
            await drained(await client.post(node.url, answer))
        await drained(await client.get(node.url, MARK))
        for name in ("mcp-session-id", "mcp-protocol-version", "origin", "host", "content-type", "accept"):
            await drained(
                await client.post(node.url, {"jsonrpc": "2.0", "id": 9, "method": "ping"}, headers={name: MARK})
            )
        await drained(await client.delete(node.url))


async def legacy(node: NodeProcess) -> None:
    async with RawSession(path="/sse", headers=HEADERS) as client, httpx.AsyncClient(trust_env=False) as http:
        where = (await (await client.get(node.url)).event()).data
        info = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": EVIL, "version": EVIL}}
        for number, (method, params) in enumerate([("initialize", info), ("notifications/initialized", {}), *ASKED]):
            body = {"jsonrpc": "2.0", "id": f"{number}{EVIL}", "method": method, "params": params}
            if method.startswith("notifications"):
                del body["id"]
            await http.post(f"{node.url}{where}", json=body)
        await http.post(f"{node.url}/messages/?session_id={MARK}&{MARK}={MARK}", json={})
        await http.post(f"{node.url}{where}", content=EVIL.encode())
        await http.request("GET", f"{node.url}/{MARK}/%0a{MARK}?{MARK}={MARK}")
        await http.request(MARK.upper(), f"{node.url}/mcp")


async def modern(node: NodeProcess) -> None:
    async with Modern(HEADERS) as client:
        for method, params in ASKED:
            headers = {"mcp-method": MARK, "mcp-name": MARK}
            await drained(await client.request(node.url, method, params, headers=headers))
            plain = json.loads(json.dumps([method, params]).replace(json.dumps(EVIL)[1:-1], MARK))
            await drained(await client.request(node.url, *plain))  # what fits into headers comes further
        for state in (EVIL, f"pgmcp1.{MARK}"):
            call = {
                "name": "breaks",
                "arguments": {"text": EVIL},
                "requestState": state,
                "inputResponses": {EVIL: EVIL},
            }
            await drained(await client.request(node.url, "tools/call", call))
        await drained(await client.request(node.url, "ping", version=f"2026-07-28{MARK}"))
        listening = await client.request(
            node.url, "subscriptions/listen", {"resourceSubscriptions": [EVIL], EVIL: EVIL}
        )
        await listening.close()


async def garbage(node: NodeProcess) -> None:
    for text in (
        f"{MARK}\r\n\r\n",
        f"GET /{MARK} HTTP/9.9\r\n\r\n",
        f"GET /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\n{MARK}\x00: {MARK}\r\n\r\n",
        f"GET /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: {MARK}\r\nconnection: upgrade\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        writer.write(text.encode())
        writer.write_eof()
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()


async def test_nothing_that_clients_send_is_written(node: NodeProcess) -> None:
    for revision in REVISIONS:
        await session(node, revision)
    await legacy(node)
    await modern(node)
    await garbage(node)
    async with Modern() as client:
        await client.result(node.url, "sells", text="bread\nand wine")
    wait_until(lambda: "bread" in node.log, 10, lambda: node.log[-2000:])
    log = node.log
    found = [line for line in log.splitlines() if MARK in line.lower()]
    assert not found, "\n".join(found[:20])
    assert not set("\r\x1b\u2028") & set(log)
    for line in log.split("\n")[:-1]:
        if log.startswith("{"):
            assert {"time", "level", "node", "logger", "message"} <= set(json.loads(line)), line
            assert RFC_3339.fullmatch(json.loads(line)["time"]), line
            assert json.loads(line)["node"] == "n1"
        else:
            assert LINE.match(line), line
    assert "sold bread\\nand wine" in log, "the served server's own lines stay"
    assert f"node n1 serves {node.url}/mcp" in log
    assert "UserWarning" in log
    assert "mcp.server" in log or "fastmcp" in log, "libraries speak"
