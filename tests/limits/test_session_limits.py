"""Limits of one session: subscriptions, and what a request says before its answer."""

from __future__ import annotations

import json
from typing import Any

import mcp_types as types
import pytest
from mcp.server.lowlevel import Server

from pgmcp.session import session_limits
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, tables_of
from tests.limits.conftest import Talker

KEPT = "select count(*) from pgmcp.journal where kind = 'subscription'"


def subscribing() -> Server:
    async def subscribe(context: object, params: object) -> types.EmptyResult:
        return types.EmptyResult()

    return Server("subscribing", on_subscribe_resource=subscribe, on_unsubscribe_resource=subscribe)


async def test_subscriptions_of_a_session(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_limits, "SUBSCRIPTIONS", 3)
    async with (
        cluster(database, subscribing, 2) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)

        async def ask(method: str, uri: str, node: int) -> dict[str, Any]:
            exchange = await session.request(
                nodes[node].url, f"resources/{method}", {"uri": uri}, request_id=uri + method
            )
            return await exchange.response(uri + method)

        for number in range(3):
            assert "result" in await ask("subscribe", f"a://{number}", number % 2)
        for node in range(2):
            error = (await ask("subscribe", "a://3", node))["error"]
            assert error["code"] == -32600
            assert "3 subscriptions" in error["message"]
            assert await tables.value(KEPT) == 3
        assert "result" in await ask("subscribe", "a://1", 1), "one that it has is not one more"
        assert "result" in await ask("unsubscribe", "a://0", 0)
        assert "result" in await ask("subscribe", "a://3", 1)
        assert await tables.value(KEPT) == 3


@pytest.mark.parametrize(("name", "bound"), [("SAID", 20), ("SAID_BYTES", 20 * 100)])
async def test_what_an_unfinished_request_says(
    database: str, talker: Talker, monkeypatch: pytest.MonkeyPatch, name: str, bound: int
) -> None:
    """What is too much gives way; the answer does not, nor does a question."""
    monkeypatch.setattr(session_limits, name, bound)
    monkeypatch.setattr(session_limits, "PACE_SECONDS", 3600.0)
    async with (
        cluster(database, talker, 2) as nodes,
        tables_of(database) as tables,
        RawSession(capabilities={"elicitation": {"form": {}}}) as session,
    ):
        await session.open(nodes[0].url)
        flood = {"name": "flood", "arguments": {"count": 200, "size": 50}}
        exchange = await session.request(nodes[1].url, "tools/call", flood, request_id="f")
        assert (await exchange.response("f"))["result"]["content"][0]["text"] == "flooded"
        said = [message for message in exchange.messages if "method" in message]
        assert 10 <= len(said) <= 20
        assert [int(message["params"]["data"].split()[0]) for message in said] == list(range(len(said)))
        stored = await tables.value("select count(*) from pgmcp.events e join pgmcp.streams s on s.id = e.stream "
                                    "where s.kind = 'request' and e.message like '%xxx%'::text::bytea")  # fmt: skip
        assert stored == len(said)
        asking = await session.request(nodes[0].url, "tools/call", {"name": "ask", "arguments": {}}, request_id="a")
        question = await asking.message("elicitation/create")
        assert (await session.answer(nodes[1].url, question, {"action": "decline"})).status == 202
        assert json.dumps((await asking.response("a"))["result"]).count("decline")
