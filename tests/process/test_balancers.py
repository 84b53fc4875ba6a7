"""The shipped nginx, haproxy and pgbouncer configurations before nodes that run as the compose file says."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import pytest_asyncio

from pgmcp.node import Node
from pgmcp.session.target import load
from pgmcp.settings import Settings
from tests.harness.clients import RawSession, connect
from tests.harness.cluster import serving, tables_of
from tests.harness.compose import compose, in_checkout
from tests.harness.shipped import CONFIGURATIONS, WITH_AFFINITY, Shipped, pgbouncer
from tests.harness.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("node-1", "node-2", "node-3")
FORGED = ("node-9", "", "node-1", "node-2", "node-3", "x" * 2000, ":node-2-" + "0" * 32)


def shipped_service(name: str, database: str, pooler: int | None = None, **env: str) -> tuple[str, dict[str, str]]:
    """Target and variables of a node in the compose file; only addresses are other ones.

    Args:
        database: in the place of the compose file's PostgreSQL.
        pooler: the port of pgbouncer, when the variables lead through it.
    """
    service: Mapping[str, Any] = compose(SERVER="../examples/everything.py", **env)["services"][name]
    word, target = service["command"]
    assert word == "serve"
    variables = {key: str(value or "") for key, value in service["environment"].items()}
    for key in ("PGMCP_DATABASE_URL", "PGMCP_LISTEN_URL"):
        straight = variables[key].replace("postgresql://pgmcp:pgmcp@postgres:5432/pgmcp", database)
        variables[key] = straight.replace("@pgbouncer:6432/", f"@127.0.0.1:{pooler}/")
    assert variables["PGMCP_NODE_NAME"] == name
    return in_checkout(service, target), {**variables, "PGMCP_DRAIN_NOTICE": "0", "PGMCP_DRAIN_LIMIT": "1"}


class Member:
    """A node as the compose file says, but for its port."""

    def __init__(self, database: str, name: str, pooler: int | None = None, **env: str) -> None:
        self.name = name
        target, self.env = shipped_service(name, database, pooler, **env)
        with pytest.MonkeyPatch.context() as patch:
            for key, value in self.env.items():
                patch.setenv(key, value)
            self._node = Node(Settings(port=0), load(target))
        self._stack = contextlib.AsyncExitStack()
        self.url = ""

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    async def __aenter__(self) -> Self:
        self.url = await self._stack.enter_async_context(serving(self._node.application()))
        self._stack.callback(self._node.stop_streams)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def leave(self) -> None:
        """Drain and stop, as after SIGTERM."""
        await self._node.drain()
        await self._stack.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(shared_database: str) -> AsyncIterator[list[Member]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Member(shared_database, name)) for name in NAMES]


@pytest.fixture(params=CONFIGURATIONS)
def balancer(request: pytest.FixtureRequest, three: list[Member], tmp_path: Path) -> Iterator[Shipped]:
    with Shipped(request.param, {one.name: one.port for one in three}, tmp_path / "balancer") as started:
        yield started


async def counted(session: RawSession, base: str) -> int:
    return int((await session.call_tool(base, "count"))["structuredContent"]["result"])


def ping(number: int) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": "ping"}


async def test_a_client_works_through_it(balancer: Shipped, request: pytest.FixtureRequest) -> None:
    async with connect(balancer.mcp_url) as client:
        counts = [(await client.call_tool("count")).structured_content for _ in range(9)]
        assert counts == [{"result": number} for number in range(1, 10)]
    await eventually(lambda: len(balancer.answered_by("POST")) >= 11, "its log is complete")
    used = balancer.answered_by("POST")
    if "round-robin" in request.node.callspec.id:
        assert set(used) == set(NAMES)
    else:
        assert len(set(used)) == 1, "the official client keeps the cookie"


async def _tells_the_client(scope: Any, _: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["client"][0].encode()})


@pytest.mark.parametrize("name", CONFIGURATIONS)
async def test_a_client_cannot_choose_its_address(name: str, tmp_path: Path) -> None:
    """Nodes see whom the balancer saw, whatever the client says."""
    async with serving(_tells_the_client, lifespan="off") as url, httpx.AsyncClient(trust_env=False) as http:
        with Shipped(name, dict.fromkeys(NAMES, int(url.rpartition(":")[2])), tmp_path / "balancer") as balancer:
            for forged in ("203.0.113.7", "203.0.113.7, 203.0.113.8", "127.0.0.1, 203.0.113.9"):
                answer = await http.get(balancer.url, headers={"x-forwarded-for": forged})
                assert answer.text == "127.0.0.1"


@pytest.mark.parametrize("balancer", WITH_AFFINITY, indirect=True)
async def test_the_hint_leads_to_the_owner(balancer: Shipped) -> None:
    """A client that keeps no cookies, as most: the session id is enough."""
    async with RawSession() as session:
        await session.open(balancer.url)
        for turn in range(1, 7):
            session.http.cookies.clear()
            assert await counted(session, balancer.url) == turn
        owner = str(session.session_id).rpartition("-")[0]
        await eventually(lambda: len(balancer.answered_by("POST")) >= 8, "its log is complete")
        assert set(balancer.answered_by("POST")) == {owner}


@pytest.mark.parametrize("balancer", WITH_AFFINITY, indirect=True)
async def test_a_cookie_goes_before_the_hint_and_a_forged_one_changes_the_route_only(balancer: Shipped) -> None:
    async with RawSession() as session:
        await session.open(balancer.url)
        for turn, cookie in enumerate(FORGED, 1):
            session.http.cookies.clear()
            before = len(balancer.answered_by("POST"))
            call = {"name": "count", "arguments": {}}
            message = {"jsonrpc": "2.0", "id": 100 + turn, "method": "tools/call", "params": call}
            exchange = await session.post(balancer.url, message, headers={"cookie": f"pgmcp_node={cookie}"})
            answer = await exchange.response(100 + turn)
            assert answer["result"]["structuredContent"] == {"result": turn}
            await eventually(lambda: len(balancer.answered_by("POST")) > before, "it is in the log")  # noqa: B023
            if cookie in NAMES:
                assert balancer.answered_by("POST")[-1] == cookie


async def test_forged_session_ids_are_unknown_on_every_route(balancer: Shipped) -> None:
    async with RawSession() as session:
        for name in (*NAMES, "node-9", "a" * 60):
            session.session_id = f"{name}-{'0' * 32}"
            assert (await session.post(balancer.url, ping(1))).status == 404


async def test_http_sse_works_through_it(balancer: Shipped) -> None:
    async with (
        httpx.AsyncClient(trust_env=False, verify=False, timeout=10) as http,
        http.stream("GET", f"{balancer.url}/sse") as stream,
    ):
        lines = (line async for line in stream.aiter_lines() if line.startswith("data: "))
        endpoint = (await anext(lines)).removeprefix("data: ")
        for number in range(4):
            hello = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "c", "version": "1"}}
            message = ping(number) if number else {**ping(0), "method": "initialize", "params": hello}
            assert (await http.post(f"{balancer.url}{endpoint}", json=message)).status_code == 202
            assert f'"id":{number}' in await anext(lines)
            http.cookies.clear()


async def test_the_pgbouncer_profile(shared_database: str) -> None:
    async with tables_of(shared_database) as tables:
        await tables.execute("create role pgmcp superuser login password 'pgmcp'")
        with pgbouncer(shared_database) as port:
            through = {"DATABASE_HOST": "pgbouncer:6432", "LISTEN_HOST": "postgres:5432"}
            async with Member(shared_database, "node-1", port, **through) as member, RawSession() as session:
                assert member.env["PGMCP_DATABASE_URL"] == f"postgresql://pgmcp:pgmcp@127.0.0.1:{port}/pgmcp"
                assert member.env["PGMCP_LISTEN_URL"] == shared_database
                await session.open(member.url)
                assert [await counted(session, member.url) for _ in range(3)] == [1, 2, 3]
                await session.delete(member.url)
        await tables.execute("drop role pgmcp")


async def test_stale_hints_and_cookies_lead_on_when_the_owner_has_left(three: list[Member], tmp_path: Path) -> None:
    """The last test that uses the three nodes: two of them leave."""
    ports = {one.name: one.port for one in three}
    for number, name in enumerate(WITH_AFFINITY):
        owner, others = three[number], {one.name for one in three[number + 1 :]}
        with Shipped(name, ports, tmp_path / f"balancer-{number}") as balancer:
            async with RawSession() as session, RawSession() as forgetful:
                for one in (session, forgetful):
                    await one.open(owner.url)
                    assert await counted(one, balancer.url) == 1
                await owner.leave()
                for _ in range(6):
                    await counted(session, balancer.url)
                    forgetful.http.cookies.clear()
                    await counted(forgetful, balancer.url)
                assert str(session.session_id).startswith(f"{owner.name}-")
                assert session.http.cookies["pgmcp_node"] in others
