"""Hints in session ids and the affinity cookie: they say who owns a session, and nothing depends on them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import httpx
import pytest

from pgmcp.errors import SettingsError
from pgmcp.settings import Settings
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, everything, tables_of
from tests.harness.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

FORGED = ("n1", "n2", "nobody", "", "x" * 3000, '"; drop table', "n1; pgmcp_node=n2")


def told(exchange: RawExchange) -> str | None:
    """The owner's name that an exchange's cookie gives."""
    cookie = exchange.headers.get("set-cookie")
    if cookie is None:
        return None
    found = re.fullmatch(r"pgmcp_node=([A-Za-z0-9_.-]+); Path=/; HttpOnly; SameSite=Lax", cookie)
    assert found, cookie
    return found[1]


async def ping(session: RawSession, node: RunningNode, cookie: str | None = None) -> RawExchange:
    """One request, with a cookie of the test's own if wanted."""
    headers = {} if cookie is None else {"cookie": f"pgmcp_node={cookie}"}
    number = session.next_id()
    message = {"jsonrpc": "2.0", "id": number, "method": "ping"}
    exchange = await session.post(node.url, message, headers=headers)
    assert exchange.status == 200
    assert (await exchange.response(number))["result"] == {}
    return exchange


async def test_the_first_owner_is_told_once(pair: Sequence[RunningNode]) -> None:
    async with RawSession() as session:
        opened = await session.initialize(pair[0].url)
        await opened.response(0)
        assert told(opened) == "n1"
        assert re.fullmatch(r"n1-[0-9a-f]{32}", str(session.session_id))
        assert told(await session.notify(pair[1].url, "notifications/initialized")) is None
        assert [told(await ping(session, node)) for node in pair] == [None, None]


async def test_a_client_without_cookies_hears_of_it_once_only(pair: Sequence[RunningNode]) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        session.http.cookies.clear()
        assert [told(await ping(session, node)) for node in pair] == [None, None]
        assert told(await session.get(pair[1].url)) is None


@pytest.mark.parametrize("cookie", FORGED)
async def test_forged_and_stale_cookies_change_nothing_and_are_put_right(
    pair: Sequence[RunningNode], cookie: str
) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        session.http.cookies.clear()
        for node in pair:
            told_now = told(await ping(session, node, cookie))
            assert told_now == (None if cookie == "n1" else "n1")
            session.http.cookies.clear()


async def test_a_forged_hint_is_an_unknown_session(pair: Sequence[RunningNode]) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        real = str(session.session_id)
        for forged in (real.replace("n1-", "n2-"), real[3:], f"n1-{real}", "n1-" + "0" * 32):
            session.session_id = forged
            exchange = await session.request(pair[0].url, "ping")
            assert (exchange.status, told(exchange)) == (404, None)
        session.session_id = real
        await ping(session, pair[1])


async def test_http_sse_tells_too(pair: Sequence[RunningNode]) -> None:
    async with (
        httpx.AsyncClient(trust_env=False, verify=False) as http,
        http.stream("GET", f"{pair[0].url}/sse") as stream,
    ):
        assert stream.headers["set-cookie"] == "pgmcp_node=n1; Path=/; HttpOnly; SameSite=Lax"


async def test_the_next_owner_is_told_on_whatever_comes_next(database: str) -> None:
    async with cluster(database, everything, 2) as nodes, tables_of(database) as tables, RawSession() as session:
        await session.open(nodes[0].url)
        await _give_away(tables, nodes[0])
        assert told(await session.notify(nodes[1].url, "notifications/roots/list_changed")) in (None, "n2")

        async def put_right() -> bool:
            await ping(session, nodes[1])
            return dict(session.http.cookies)["pgmcp_node"] == "n2"

        await eventually(put_right, "the cookie names the new owner")
        assert str(session.session_id).startswith("n1-")
        assert told(await ping(session, nodes[1])) is None


async def _give_away(tables: Tables, node: RunningNode) -> None:
    """Let a node be declared dead and another take its sessions."""
    await tables.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", node.incarnation.node_id)


async def test_it_can_be_switched_off(database: str) -> None:
    async with cluster(database, everything, 1, affinity_cookie=False) as [node], RawSession() as session:
        opened = await session.initialize(node.url)
        assert told(opened) is None
        await opened.response(0)
        await session.notify(node.url, "notifications/initialized")
        assert told(await ping(session, node, "stale")) is None


@pytest.mark.parametrize("name", ["knoten-ä", "a b", "a;b", "a\n"])
async def test_a_name_that_no_header_can_carry_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="node_name"):
        Settings(node_name=name)
