"""What access logs say, and what they must not."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from litestar import Litestar
from starlette.applications import Starlette
from starlette.routing import Mount

from pgmcp import Cluster, ClusterPlugin
from pgmcp.ops import logs
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything, serving
from tests.harness.waiting import eventually

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


class Kept(logging.Handler):
    """Keeps the lines of our access log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """The lines of our access log."""
    handler, logger = Kept(), logging.getLogger("pgmcp.access")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


async def test_a_line_for_each_exchange_at_its_end(database: str, kept: Kept) -> None:
    kept.setFormatter(logs.handler("json", sys.stderr).formatter)
    async with cluster(database, everything, 2, access_log=True) as nodes:
        async with RawSession() as session, httpx.AsyncClient(trust_env=False, verify=False) as http:
            await session.open(nodes[0].url)
            count = len(kept.lines)
            listening = await session.get(nodes[1].url)
            assert (await session.call_tool(nodes[1].url, "count"))["structuredContent"] == {"result": 1}
            assert (await session.post(nodes[0].url, b"{")).status == 400
            assert (await http.get(f"{nodes[0].url}/no%0Awhere?token=secret")).status_code == 404
            assert (await http.get(f"{nodes[0].url}/livez")).status_code == 200
            await eventually(lambda: len(kept.lines) == count + 4, "four exchanges are over")
            await listening.close()
            await eventually(lambda: len(kept.lines) == count + 5, "the stream is over")
        assert session.session_id is not None
        secret = session.session_id.rpartition("-")[2]
    lines = [json.loads(line) for line in kept.lines[count:]]
    said = sorted((line["method"], line["path"], line["status"]) for line in lines)
    assert said == [
        ("GET", "/livez", 200),
        ("GET", "/mcp", 200),
        ("GET", "/no%0Awhere", 404),
        ("POST", "/mcp", 200),
        ("POST", "/mcp", 400),
    ]
    assert (lines[-1]["method"], lines[-1]["path"]) == ("GET", "/mcp"), "a stream's line comes at its end"
    assert lines[-1]["seconds"] >= max(line["seconds"] for line in lines[:-1] if line["path"] != "/mcp")
    for line in lines:
        assert line["client"] == "127.0.0.1"
        assert line["bytes"] > 0
        assert line["message"].startswith(f"{line['method']} {line['path']} {line['status']} in ")
    assert not any(secret in line or "secret" in line for line in kept.lines)


async def test_an_exchange_that_was_not_answered(database: str, kept: Kept) -> None:
    async with cluster(database, everything, 1, access_log=True) as [node]:
        at = urlsplit(node.url)
        _, writer = await asyncio.open_connection(at.hostname, at.port)
        writer.write(
            b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\n"
        )
        writer.close()
        await eventually(lambda: kept.lines, "its line is there")
    assert kept.lines[0].startswith("POST /mcp None in ")


@pytest.mark.parametrize("wanted", [False, True])
async def test_nothing_is_written_unasked(database: str, kept: Kept, wanted: bool) -> None:
    async with cluster(database, everything, 1, access_log=wanted) as [node], RawSession() as session:
        await session.open(node.url)
    assert bool(kept.lines) == wanted


async def test_inside_a_litestar_application(database: str, kept: Kept) -> None:
    app = Litestar(plugins=[ClusterPlugin(everything(), database, access_log=True)], openapi_config=None)
    async with serving(app) as base, RawSession() as session:
        await session.open(base)
    assert [line.split(" in ")[0] for line in kept.lines] == ["POST /mcp 200", "POST /mcp 202"]


@pytest.mark.parametrize("prefix", ["", "/tools"], ids=["plain", "mounted"])
async def test_somebody_elses_uvicorn_masks_session_ids(
    database: str, capsys: pytest.CaptureFixture[str], prefix: str
) -> None:
    inner = Cluster(database).app(everything())
    app = Starlette(routes=[Mount(prefix, inner)], lifespan=lambda _: inner.lifespan()) if prefix else inner
    async with (
        serving(app, access_log=True, log_level="info") as base,
        RawSession(path=f"{prefix}/sse") as client,
        httpx.AsyncClient(trust_env=False, verify=False) as http,
    ):
        where = str((await (await client.get(base)).event()).data)
        path, _, session_id = where.partition("?session_id=")
        assert (await http.post(f"{base}{where}", json=PING)).status_code == 202
        for odd in (f"?a=1&session_id={session_id}&b=2", f"?session%5Fid={session_id}", "?a=b&c"):
            await http.post(f"{base}{path}{odd}", json=PING)
    written = capsys.readouterr().out  # uvicorn's access log
    assert session_id not in written
    targets = [line.split('"')[1].split()[1] for line in written.splitlines() if '"POST' in line]
    assert targets == [
        f"{prefix}/messages/{query}"
        for query in ("?session_id=***", "?a=1&session_id=***&b=2", "?session%5Fid=***", "?a=b&c")
    ]
