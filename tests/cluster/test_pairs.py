"""Every exchange goes to a node that the test chooses: to the session's owner, or elsewhere.

Sessions are opened on the first node, so node 0 owns them; ``edge`` is the node of the call, ``back`` the node of what
comes back from the client (answers, cancels, resumes), ``ear`` the node of the standalone stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest

from tests.harness.clients import Message, RawExchange, RawSession
from tests.harness.cluster import RunningNode, Tables
from tests.harness.waiting import eventually

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning"),  # all of it is served here
]

NODES = [pytest.param(0, id="owner"), pytest.param(1, id="other")]
edges = pytest.mark.parametrize("edge", NODES)
backs = pytest.mark.parametrize("back", NODES)
ears = pytest.mark.parametrize("ear", NODES)

FORM: dict[str, Any] = {"elicitation": {"form": {}}}
UPDATED, WATCHED = "notifications/resources/updated", "test://watched-resource"


def tool(name: str, /, *, token: str | None = None, **arguments: object) -> dict[str, Any]:
    meta = {} if token is None else {"_meta": {"progressToken": token}}
    return {"name": name, "arguments": arguments, **meta}


def place(event_id: str | None) -> tuple[str, int]:
    assert event_id is not None
    stream, _, seq = event_id.rpartition(".")
    return stream, int(seq)


def numbers(exchange: RawExchange) -> list[int]:
    """The sequence numbers of the messages that came, after a check that all are of one stream."""
    places = [place(event.id) for event in exchange.seen if event.message is not None]
    assert len({stream for stream, _ in places}) <= 1, places
    return [seq for _, seq in places]


def text_of(answer: Message) -> str:
    return str(answer["result"]["content"][0]["text"])


async def running(session: RawSession, base: str) -> int:
    return int((await session.call_tool(base, "slow_calls_running"))["structuredContent"]["result"])


# A call and what belongs to it


@edges
async def test_a_call_is_answered_on_its_own_stream(pair: Sequence[RunningNode], edge: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        for turn in (1, 2, 3):
            async with await session.request(
                pair[edge].url, "tools/call", tool("count"), request_id=f"call {turn}"
            ) as exchange:
                events = await exchange.rest()
                assert exchange.status == 200
                assert exchange.error is None
                assert exchange.headers["mcp-session-id"] == session.session_id
                assert exchange.headers["content-type"] == "text/event-stream"
                assert exchange.headers["x-accel-buffering"] == "no"
                assert events[0].is_priming
                assert numbers(exchange) == [1]
                assert place(events[0].id)[1] == 0
                assert exchange.messages[0]["id"] == f"call {turn}"
                assert exchange.messages[0]["result"]["structuredContent"] == {"result": turn}


@edges
@ears
async def test_progress_is_on_the_requests_stream_in_order(pair: Sequence[RunningNode], edge: int, ear: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        standalone = await session.get(pair[ear].url)
        await session.call(pair[edge].url, "resources/subscribe", {"uri": WATCHED})
        exchange = await session.request(
            pair[edge].url, "tools/call", tool("test_tool_with_progress", token="p"), request_id=70
        )
        await exchange.rest()
        *progress, answer = exchange.messages
        assert [message["params"] for message in progress] == [
            {"progressToken": "p", "progress": value, "total": 100} for value in (0, 50, 100)
        ]
        assert answer["id"] == 70
        assert numbers(exchange) == [1, 2, 3, 4]
        await session.call_tool(pair[edge].url, "touch_watched_resource", text="fence")
        await standalone.message(UPDATED)
        assert [message["method"] for message in standalone.messages] == [UPDATED]


@edges
@backs
async def test_elicitation(pair: Sequence[RunningNode], edge: int, back: int) -> None:
    async with RawSession(capabilities=FORM) as session:
        await session.open(pair[0].url)
        exchange = await session.request(
            pair[edge].url, "tools/call", tool("test_elicitation", message="Who?"), request_id=5
        )
        question = await exchange.message("elicitation/create")
        assert question["params"]["message"] == "Who?"
        content = {"username": "ada", "email": "ada@example.org"}
        accepted = await session.answer(pair[back].url, question, {"action": "accept", "content": content})
        assert (accepted.status, accepted.body) == (202, b"")
        answer = await exchange.response(5)
        assert text_of(answer) == (
            'User response: action=accept, content={"username": "ada", "email": "ada@example.org"}'
        )
        assert await exchange.next() is None
        assert exchange.error is None


@edges
@backs
async def test_sampling(pair: Sequence[RunningNode], edge: int, back: int) -> None:
    async with RawSession(capabilities={"sampling": {}}) as session:
        await session.open(pair[0].url)
        exchange = await session.request(pair[edge].url, "tools/call", tool("test_sampling", prompt="Hi"), request_id=5)
        question = await exchange.message("sampling/createMessage")
        reply = {"role": "assistant", "content": {"type": "text", "text": "Ho"}, "model": "m"}
        assert (await session.answer(pair[back].url, question, reply)).status == 202
        assert text_of(await exchange.response(5)) == "LLM response: Ho"


@edges
@backs
async def test_an_error_is_an_answer_to_a_question_too(pair: Sequence[RunningNode], edge: int, back: int) -> None:
    async with RawSession(capabilities=FORM) as session:
        await session.open(pair[0].url)
        exchange = await session.request(
            pair[edge].url, "tools/call", tool("test_elicitation", message="Who?"), request_id=5
        )
        question = await exchange.message("elicitation/create")
        refused = {"jsonrpc": "2.0", "id": question["id"], "error": {"code": -1, "message": "not today"}}
        assert (await session.post(pair[back].url, refused)).status == 202
        assert "not today" in str(await exchange.response(5))


@edges
@backs
@ears
async def test_roots_are_asked_for_on_the_standalone_stream(
    pair: Sequence[RunningNode], edge: int, back: int, ear: int
) -> None:
    async with RawSession(capabilities={"roots": {}}) as session:
        await session.open(pair[0].url)
        standalone = await session.get(pair[ear].url)
        exchange = await session.request(pair[edge].url, "tools/call", tool("client_roots"), request_id=5)
        question = await standalone.message("roots/list")
        assert (await session.answer(pair[back].url, question, {"roots": [{"uri": "file:///a"}]})).status == 202
        answer = await exchange.response(5)
        assert answer["result"]["structuredContent"] == {"result": ["file:///a"]}
        assert [message.get("method") for message in exchange.messages] == [None]


async def test_an_answer_that_nobody_asked_for_is_dropped(pair: Sequence[RunningNode]) -> None:
    async with RawSession(capabilities=FORM) as session:
        await session.open(pair[0].url)
        exchange = await session.request(
            pair[1].url, "tools/call", tool("test_elicitation", message="Who?"), request_id=5
        )
        question = await exchange.message("elicitation/create")
        for wrong in (question["id"] + 1, 1, "1", str(question["id"])):
            forged = {"jsonrpc": "2.0", "id": wrong, "result": {"action": "accept", "content": {}}}
            assert (await session.post(pair[1].url, forged)).status == 202
        assert (await session.answer(pair[1].url, question, {"action": "decline"})).status == 202
        assert text_of(await exchange.response(5)) == "User response: action=decline, content=null"
        assert (await session.answer(pair[0].url, question, {"action": "cancel"})).status == 202
        assert (await session.call(pair[0].url, "ping"))["result"] == {}


# State of the session


@edges
@backs
async def test_a_log_level_that_one_node_took_holds_for_calls_on_the_other(
    pair: Sequence[RunningNode], edge: int, back: int
) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        for level, expected in (("error", 0), ("info", 3), ("alert", 0)):
            assert (await session.call(pair[edge].url, "logging/setLevel", {"level": level}))["result"] == {}
            exchange = await session.request(pair[back].url, "tools/call", tool("test_tool_with_logging"))
            await exchange.rest()
            assert len(exchange.messages) == expected + 1
            assert [message.get("method") for message in exchange.messages] == [
                *["notifications/message"] * expected,
                None,
            ]


@edges
@backs
@ears
async def test_subscriptions_are_told_on_the_standalone_stream(
    pair: Sequence[RunningNode], edge: int, back: int, ear: int
) -> None:
    async with RawSession() as session, RawSession() as stranger, RawSession() as witness:
        for one in (session, stranger, witness):
            await one.open(pair[0].url)
        await witness.call(pair[0].url, "resources/subscribe", {"uri": WATCHED})
        witnessed = await witness.get(pair[0].url)
        deaf = await stranger.get(pair[ear].url)
        standalone = await session.get(pair[ear].url)
        assert (await session.call(pair[edge].url, "resources/subscribe", {"uri": WATCHED}))["result"] == {}
        await session.call_tool(pair[back].url, "touch_watched_resource", text="1")
        assert (await standalone.message(UPDATED))["params"] == {"uri": WATCHED}
        assert (await session.call(pair[back].url, "resources/unsubscribe", {"uri": WATCHED}))["result"] == {}
        await session.call_tool(pair[edge].url, "touch_watched_resource", text="2")
        for _ in range(2):
            await witnessed.message(UPDATED)  # it was told to whoever was subscribed
        for one in (session, stranger):
            await one.call(pair[edge].url, "resources/subscribe", {"uri": WATCHED})
        await stranger.call_tool(pair[edge].url, "touch_watched_resource", text="3")
        await deaf.message(UPDATED)
        await standalone.message(UPDATED)
        assert (numbers(standalone), numbers(deaf)) == ([1, 2], [1])


@ears
async def test_what_nobody_listens_to_waits_for_the_next_listener(pair: Sequence[RunningNode], ear: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        await session.call(pair[1].url, "resources/subscribe", {"uri": WATCHED})
        await session.call_tool(pair[1].url, "touch_watched_resource", text="1")
        standalone = await session.get(pair[ear].url)
        await standalone.message(UPDATED)
        assert len(standalone.messages) == 1


@edges
async def test_ping(pair: Sequence[RunningNode], edge: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        assert (await session.call(pair[edge].url, "ping"))["result"] == {}


# Cancelling and hanging up


@edges
@backs
async def test_a_cancel_stops_the_tool_and_ends_the_stream(pair: Sequence[RunningNode], edge: int, back: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        exchange = await session.request(
            pair[edge].url, "tools/call", tool("slow", token="t", seconds=60, steps=6000), request_id="x"
        )
        await exchange.message("notifications/progress")
        assert await running(session, pair[back].url) == 1
        cancel = {"requestId": "x", "reason": "enough"}
        assert (await session.notify(pair[back].url, "notifications/cancelled", cancel)).status == 202
        assert (await exchange.response("x"))["error"] == {"code": -32800, "message": "Request cancelled"}
        assert await exchange.next() is None
        assert exchange.error is None
        assert await running(session, pair[back].url) == 0


@edges
@backs
async def test_a_cancel_that_overtakes_its_request_is_kept(pair: Sequence[RunningNode], edge: int, back: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        cancel = {"requestId": 77}
        assert (await session.notify(pair[back].url, "notifications/cancelled", cancel)).status == 202
        exchange = await session.request(pair[edge].url, "tools/call", tool("count"), request_id=77)
        assert (await exchange.response(77))["error"]["code"] == -32800
        assert (await session.call_tool(pair[edge].url, "count"))["structuredContent"] == {"result": 1}


@edges
async def test_a_cancel_that_came_too_late_does_not_hit_the_next_request_with_this_id(
    pair: Sequence[RunningNode], edge: int
) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        exchange = await session.request(pair[edge].url, "tools/call", tool("count"), request_id=77)
        await exchange.rest()
        assert (await session.notify(pair[edge].url, "notifications/cancelled", {"requestId": 77})).status == 202
        again = await session.request(pair[edge].url, "tools/call", tool("count"), request_id=77)
        assert (await again.response(77)).get("result", {}).get("structuredContent") == {"result": 2}


@edges
@backs
async def test_hanging_up_is_no_cancel_and_the_answer_can_be_fetched_anywhere(
    pair: Sequence[RunningNode], tables: Tables, edge: int, back: int
) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        exchange = await session.request(
            pair[edge].url, "tools/call", tool("slow", token="t", seconds=0.5, steps=10), request_id=8
        )
        priming = await exchange.event()
        assert priming.is_priming
        await exchange.close()
        stream = UUID(place(priming.id)[0])
        sink = "select sink is null from pgmcp.streams where id = $1"
        await eventually(lambda: tables.value(sink, stream), "the edge lets go of the stream")
        resumed = await session.get(pair[back].url, priming.id)
        assert resumed.status == 200
        answer = await resumed.response(8)
        assert text_of(answer) == "10 steps in 0.5 s"
        assert await resumed.next() is None
        assert resumed.error is None
        assert numbers(resumed) == list(range(1, 12))


@edges
@backs
async def test_a_resume_gives_exactly_what_is_later(pair: Sequence[RunningNode], edge: int, back: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        exchange = await session.request(
            pair[edge].url, "tools/call", tool("slow", token="t", seconds=0.6, steps=12), request_id=8
        )
        for _ in range(3):
            await exchange.message("notifications/progress")
        await exchange.close()
        resumed = await session.get(pair[back].url, exchange.last_event_id)
        head = await resumed.event()
        assert head.is_priming
        assert head.id == exchange.last_event_id
        for _ in range(3):
            await resumed.message("notifications/progress")
        await resumed.close()
        last = await session.get(pair[edge].url, resumed.last_event_id)
        await last.response(8)
        assert await last.next() is None
        assert (numbers(exchange), numbers(resumed), numbers(last)) == ([1, 2, 3], [4, 5, 6], list(range(7, 14)))
        steps = [m["params"]["progress"] for m in [*exchange.messages, *resumed.messages, *last.messages[:-1]]]
        assert steps == list(range(1, 13))
        # again, from the middle, when all is over: the log still has it, and nothing runs again
        again = await session.get(pair[back].url, resumed.last_event_id)
        await again.rest()
        assert [event.id for event in again.seen[1:]] == [event.id for event in last.seen[1:]]
        assert again.messages == last.messages


@edges
@backs
async def test_there_is_nothing_to_resume_in_a_stream_that_was_read_to_its_end(
    pair: Sequence[RunningNode], edge: int, back: int
) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        exchange = await session.request(pair[edge].url, "tools/call", tool("count"))
        await exchange.rest()
        for node in (pair[back], pair[edge], pair[back]):
            gone = await session.get(node.url, exchange.last_event_id)
            assert (gone.status, gone.body) == (204, b"")
            assert "content-type" not in gone.headers


@edges
async def test_an_unknown_stream_and_one_of_another_session_have_nothing_to_resume(
    pair: Sequence[RunningNode], edge: int
) -> None:
    async with RawSession() as session, RawSession() as other:
        await session.open(pair[0].url)
        await other.open(pair[0].url)
        exchange = await other.request(pair[0].url, "tools/call", tool("count"))
        await exchange.rest()
        others = [event.id for event in exchange.seen if event.id]
        for unknown in ("0" * 32 + ".0", "f" * 32 + ".7", *others):
            gone = await session.get(pair[edge].url, unknown)
            assert (gone.status, gone.body) == (204, b""), unknown
            assert "content-type" not in gone.headers


# Several connections


@pytest.mark.parametrize(("first", "second"), [*itertools.product((0, 1), repeat=2)])
async def test_the_newest_listener_gets_what_comes(pair: Sequence[RunningNode], first: int, second: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        await session.call(pair[0].url, "resources/subscribe", {"uri": WATCHED})
        old = await session.get(pair[first].url)
        await session.call_tool(pair[0].url, "touch_watched_resource", text="1")
        await old.message(UPDATED)
        new = await session.get(pair[second].url, old.last_event_id)
        await old.rest()
        assert old.error is None
        await session.call_tool(pair[1].url, "touch_watched_resource", text="2")
        await new.message(UPDATED)
        assert (numbers(old), numbers(new)) == ([1], [2])


@pytest.mark.parametrize(("first", "second"), [*itertools.product((0, 1), repeat=2)])
async def test_a_message_goes_to_one_connection_also_without_last_event_id(
    pair: Sequence[RunningNode], first: int, second: int
) -> None:
    """2025-11-25, Multiple Connections 2: a message is never sent on two streams."""
    async with RawSession() as session:
        await session.open(pair[0].url)
        await session.call(pair[0].url, "resources/subscribe", {"uri": WATCHED})
        old = await session.get(pair[first].url)
        await session.call_tool(pair[0].url, "touch_watched_resource", text="1")
        await old.message(UPDATED)
        new = await session.get(pair[second].url)
        await old.rest()
        await session.call_tool(pair[1].url, "touch_watched_resource", text="2")
        await new.message(UPDATED)
        assert (numbers(old), numbers(new)) == ([1], [2])


@edges
@backs
async def test_a_running_call_moves_to_the_newest_connection(pair: Sequence[RunningNode], edge: int, back: int) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        old = await session.request(
            pair[edge].url, "tools/call", tool("slow", token="t", seconds=0.5, steps=10), request_id=8
        )
        await old.message("notifications/progress")
        new = await session.get(pair[back].url, old.last_event_id)
        await new.response(8)
        await old.rest()
        assert old.error is None
        assert all("result" not in message for message in old.messages)
        later = numbers(new)
        assert later == list(range(2, 12))


@edges
@backs
async def test_a_tool_can_close_its_stream_and_the_client_comes_back(
    pair: Sequence[RunningNode], edge: int, back: int
) -> None:
    async with RawSession() as session:
        await session.open(pair[0].url)
        exchange = await session.request(pair[edge].url, "tools/call", tool("test_reconnection"), request_id=8)
        events = await exchange.rest()
        assert exchange.error is None
        assert exchange.messages == []
        assert events[0].is_priming
        assert any(event.retry for event in events)
        resumed = await session.get(pair[back].url, exchange.last_event_id)
        assert text_of(await resumed.response(8)) == "This answer came after the stream was closed."
        assert await resumed.next() is None


@edges
@pytest.mark.parametrize("version", ["2025-03-26", "2025-06-18"])
async def test_a_stream_is_not_closed_on_clients_that_cannot_come_back(
    pair: Sequence[RunningNode], edge: int, version: str
) -> None:
    """Before 2025-11-25 there is no priming event, so such a client could never fetch its answer."""
    async with RawSession(protocol_version=version) as session:
        await session.open(pair[0].url)
        exchange = await session.request(pair[edge].url, "tools/call", tool("test_reconnection"), request_id=8)
        assert text_of(await exchange.response(8)) == "This answer came after the stream was closed."
