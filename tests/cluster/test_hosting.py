"""pgmcp inside other people's applications."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from litestar import Litestar, get
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from pgmcp import Cluster, ClusterPlugin
from pgmcp.errors import SettingsError, TargetError
from pgmcp.node import host_name
from tests.harness.clients import RawSession
from tests.harness.cluster import everything, serving, tables_of


def plain(database: str) -> Any:
    return Cluster(database).app(everything())


def in_starlette(database: str) -> Any:
    app = Cluster(database).app(everything())
    return Starlette(
        routes=[Route("/own", lambda _: PlainTextResponse("own")), Mount("/tools", app)],
        lifespan=lambda _: app.lifespan(),
    )


def in_fastapi(database: str) -> Any:
    mcp = Cluster(database).app(everything())
    app = FastAPI(lifespan=lambda _: mcp.lifespan())

    @app.get("/own", response_class=PlainTextResponse)
    async def own() -> str:
        return "own"

    app.mount("/tools", mcp)
    return app


def in_litestar(database: str) -> Any:
    @get("/own", sync_to_thread=False)
    def own() -> str:
        return "own"

    return Litestar(route_handlers=[own], plugins=[ClusterPlugin(everything(), database)], openapi_config=None)


everywhere = pytest.mark.parametrize(
    ("build", "prefix"), [(plain, ""), (in_starlette, "/tools"), (in_fastapi, "/tools"), (in_litestar, "")]
)


@contextlib.asynccontextmanager
async def two(build: Callable[[str], Any], database: str) -> AsyncIterator[tuple[str, str]]:
    async with serving(build(database)) as one, serving(build(database)) as other:
        yield one, other


@everywhere
async def test_it_works_there(build: Callable[[str], Any], prefix: str, database: str) -> None:
    async with two(build, database) as (one, other), RawSession(path=f"{prefix}/mcp") as session:
        await session.open(one, other)
        for turn, base in enumerate([one, other, one, other], 1):
            assert (await session.call_tool(base, "count"))["structuredContent"] == {"result": turn}
        if build is not plain:
            async with httpx.AsyncClient(verify=False) as client:
                assert (await client.get(f"{one}/own")).text == "own"


@everywhere
async def test_http_and_sse_names_an_endpoint_that_is_there(
    build: Callable[[str], Any], prefix: str, database: str
) -> None:
    async with (
        two(build, database) as (one, other),
        httpx.AsyncClient(verify=False) as client,
        client.stream("GET", f"{one}{prefix}/sse") as stream,
    ):
        lines = stream.aiter_lines()
        assert [await anext(lines), await anext(lines)] == ["retry: 1000", "event: endpoint"]
        where = (await anext(lines)).removeprefix("data: ")
        assert where.startswith(f"{prefix}/messages/?session_id=")
        posted = await client.post(f"{other}{where}", json={"jsonrpc": "2.0", "id": 1, "method": "ping"})
        assert posted.status_code == 202


async def test_nodes_without_names_are_told_apart_and_say_what_to_set(
    database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: database[-12:])  # on this host others may run
    message = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    async with two(in_fastapi, database) as (one, _), tables_of(database) as tables:
        rows = await tables.rows("select node_name, address from pgmcp.live_nodes")
        assert {row["node_name"] for row in rows} == {host_name(), f"{host_name()}-{os.getpid()}"}
        assert {row["address"] for row in rows} == {"unknown"}
        async with httpx.AsyncClient(verify=False) as client:
            for sent, status, which in (
                ({"host": "mcp.example"}, 421, "hosts"),
                ({"origin": "https://app.example"}, 403, "origins"),
            ):
                answers = [await client.post(f"{one}/tools/mcp", json=message, headers=sent) for _ in range(2)]
                assert {answer.status_code for answer in answers} == {status}
                ours = [each.getMessage() for each in caplog.records if each.name == "pgmcp.web.hosts"]
                said = [each for each in ours if str(status) in each]
                assert len(said) == 1
                for text in (answers[0].text, said[0]):
                    assert f"--allowed-{which}" in text
                    assert f"allowed_{which}=" in text
        assert len(ours) == 2
        assert "example" not in str(ours)
    async with serving(Cluster(database, allowed_hosts="mcp.example").app(everything())) as base:
        async with httpx.AsyncClient(verify=False) as client:
            answer = await client.post(f"{base}/mcp", json=message, headers={"host": "mcp.example"})
            assert answer.status_code not in {421, 403}
        async with tables_of(database) as tables:
            assert await tables.value("select node_name from pgmcp.live_nodes") == host_name()


async def test_a_lifespan_that_was_not_run_is_said_so(database: str) -> None:
    app = Starlette(routes=[Mount("/tools", Cluster(database).app(everything()))])
    async with serving(app) as base, httpx.AsyncClient(verify=False) as client:
        answer = await client.post(
            f"{base}/tools/mcp",
            json={"jsonrpc": "2.0", "id": 1, "method": "ping"},
            headers={"accept": "application/json, text/event-stream", "mcp-session-id": "x"},
        )
        assert answer.status_code == 503
        assert "lifespan" in answer.json()["error"]["message"]


async def test_what_cannot_be_served_is_said_so(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGMCP_DATABASE_URL", raising=False)
    with pytest.raises(TargetError, match="pgmcp serves"):
        Cluster(database).app(object())
    with pytest.raises(SettingsError, match="No database"):
        Cluster().app(everything())
