"""What was acknowledged first is handled first, also when it was acknowledged by another node."""

from __future__ import annotations

from typing import Any

import pytest
from mcp.server import Server, ServerRequestContext
from mcp_types import EmptyResult, NotificationParams, RequestParams

from tests.harness.clients import RawSession
from tests.harness.cluster import cluster

TURNS = 300


class Numbered(NotificationParams):
    number: int


class Asked(RequestParams):
    number: int


class Witness:
    """A server that notes what it is told, in the order in which its handlers start."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def server(self) -> Server[Any]:
        server: Server[Any] = Server("witness")

        async def told(_: ServerRequestContext[Any], params: Numbered) -> None:
            self.seen.append(("told", params.number))

        async def asked(_: ServerRequestContext[Any], params: Asked) -> EmptyResult:
            self.seen.append(("asked", params.number))
            return EmptyResult()

        server.add_notification_handler("notifications/test", Numbered, told)
        server.add_request_handler("test/ask", Asked, asked)
        return server


@pytest.mark.parametrize(("first", "second"), [(1, 0), (0, 1), (1, 2)], ids=["other-owner", "owner-other", "others"])
async def test_a_call_is_handled_after_what_was_acknowledged_before_it(database: str, first: int, second: int) -> None:
    witness = Witness()
    turns = TURNS if (first, second) == (1, 0) else TURNS // 20
    async with cluster(database, witness.server, 3) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        for number in range(turns):
            told = await session.notify(nodes[first].url, "notifications/test", {"number": number})
            assert told.status == 202
            assert "result" in await session.call(nodes[second].url, "test/ask", {"number": number})
    assert witness.seen == [(kind, number) for number in range(turns) for kind in ("told", "asked")]


async def test_a_burst_of_acknowledged_messages_keeps_its_order(database: str) -> None:
    """Round robin over the nodes, each sent when the one before was acknowledged."""
    witness = Witness()
    async with cluster(database, witness.server, 3) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        for number in range(150):
            assert (await session.notify(nodes[number % 3].url, "notifications/test", {"number": number})).status == 202
        await session.call(nodes[1].url, "test/ask", {"number": 150})
    assert witness.seen == [*(("told", number) for number in range(150)), ("asked", 150)]
