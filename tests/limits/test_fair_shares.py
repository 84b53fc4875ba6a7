"""2026-07-28: one caller holds a share of a node's places, so that whoever comes finds room."""

from __future__ import annotations

import contextlib
import json

import pytest

from pgmcp.errors import NodeFull, SessionBusy
from pgmcp.types import ANONYMOUS
from pgmcp.web.admission import ALONE_SECONDS, Caller
from pgmcp.web.fair_shares import FairShares
from tests.harness.clock import FakeClock
from tests.harness.cluster import cluster, everything
from tests.harness.modern import ACCEPT, Modern, asked
from tests.harness.waiting import eventually

LISTEN = "subscriptions/listen"
TOOLS = {"notifications": {"toolsListChanged": True}}
SLOW = {"name": "slow", "arguments": {"seconds": 60, "steps": 6000}}


def caller(number: int) -> Caller:
    return Caller(ANONYMOUS, f"10.0.0.{number}")


def filled(shares: FairShares, stack: contextlib.ExitStack, caller: Caller) -> int:
    """Hold places for a caller until it is refused; how many."""
    held = 0
    with contextlib.suppress(SessionBusy):
        while True:
            stack.enter_context(shares.held(caller))
            held += 1
    return held


def test_alone_three_quarters_and_beside_others_a_quarter() -> None:
    clock = FakeClock()
    shares = FairShares(100, "things", clock)
    with contextlib.ExitStack() as stack:
        assert filled(shares, stack, caller(1)) == 75
        clock.jump(2 * ALONE_SECONDS)
        assert filled(shares, stack, caller(2)) == 13  # no more than are free: the next ones find room, too
        assert filled(shares, stack, caller(3)) == 6
        assert filled(shares, stack, caller(4)) == 3
    assert shares.callers == 0
    with contextlib.ExitStack() as stack:
        assert filled(shares, stack, caller(1)) == 25
        clock.jump(ALONE_SECONDS)
        assert filled(shares, stack, caller(1)) == 50  # nobody else has been there since
    with contextlib.ExitStack() as stack:
        stack.enter_context(shares.held(caller(2)))
        clock.jump(ALONE_SECONDS)
        assert filled(shares, stack, caller(1)) == 25  # the other is still there


def test_many_callers_find_room_until_there_is_none() -> None:
    shares = FairShares(10, "things", FakeClock())
    with contextlib.ExitStack() as stack:
        for number in range(10):
            stack.enter_context(shares.held(caller(number)))
        with pytest.raises(NodeFull):
            stack.enter_context(shares.held(caller(11)))


async def test_listen_streams_and_calls_of_one_caller_leave_room_for_others(database: str) -> None:
    one, two = {"x-forwarded-for": "10.0.0.1"}, {"x-forwarded-for": "10.0.0.2"}
    async with (
        cluster(database, everything, 1, max_exchanges=8, max_listens=4) as [node],
        Modern(one) as flood,
        Modern(two) as other,
    ):
        listening = [await flood.request(node.url, LISTEN, TOOLS) for _ in range(4)]
        assert [stream.status for stream in listening] == [200, 200, 200, 429]
        assert "3 subscriptions/listen streams" in listening[3].json()["error"]["message"]
        assert (await other.request(node.url, "tools/call", SLOW)).status == 200  # they take no places of calls
        assert (await other.request(node.url, LISTEN, TOOLS)).status == 200
        full = await other.request(node.url, LISTEN, TOOLS)
        assert (full.status, full.headers["retry-after"]) == (503, "1")
        calls = [await flood.request(node.url, "tools/call", SLOW) for _ in range(3)]
        assert [call.status for call in calls] == [200, 200, 429]
        assert (await other.request(node.url, "server/discover")).status == 200
        await calls[0].close()
        await eventually(lambda: again(flood, node.url), "there is room again")


async def again(client: Modern, base: str) -> bool:
    return (await client.request(base, "server/discover")).status == 200


async def test_who_lies_about_its_method_gains_nothing(database: str) -> None:
    async with cluster(database, everything, 1) as [node], Modern() as client:
        for method, told, params in ((LISTEN, "tools/call", TOOLS), ("tools/call", LISTEN, SLOW)):
            headers, body = asked(method, params)
            sent = {"accept": ACCEPT, "content-type": "application/json", **headers, "mcp-method": told}
            refused = await client.send("POST", node.url, sent, json.dumps(body).encode())
            assert (refused.status, refused.json()["error"]["code"]) == (400, -32020)
        assert node.modern.open == 0
