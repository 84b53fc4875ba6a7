"""``Inbox``: accepted messages are joined, claimed and ended as the port says, also by two nodes at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pgmcp.errors import DuplicateRequest, Fenced, SessionUnknown
from pgmcp.types import ANONYMOUS, JUMP, Attachment, Claimed, Cursor, Message, Principal, StreamId
from tests.harness.stores import HELD, IDS, answer, opened, outcome, request
from tests.ports.benches import Pair

ME = Principal("client", "https://issuer", "me")


async def answered(pair: Pair, message: Message) -> Claimed:
    """Accept a request at the second node, run it at the first one and store its answer."""
    await pair.two.inbox.accept([message])
    (claimed,) = await pair.one.inbox.claim(pair.session.ownership)
    await pair.one.log.append(answer(claimed))
    return claimed


@pytest.mark.parametrize(
    "who", [ANONYMOUS, replace(ME, client_id="other"), replace(ME, issuer=None), replace(ME, subject="you")]
)
async def test_a_foreign_principal_meets_what_an_unknown_session_gives(pair: Pair, who: Principal) -> None:
    mine = await opened(pair.one, ME)
    assert (await pair.two.inbox.find(mine.session_id, ME)).session == mine.key
    foreign = [
        pair.two.inbox.find(mine.session_id, who),
        pair.two.inbox.accept([request(mine, principal=who)]),
        pair.two.inbox.end(mine.session_id, who),
        pair.two.log.attach(mine.session_id, who, None),
    ]
    unknown = [
        pair.two.inbox.find("nobody", who),
        pair.two.inbox.accept([request("nobody", principal=who)]),
        pair.two.inbox.end("nobody", who),
        pair.two.log.attach("nobody", who, None),
    ]
    for call, same in zip(foreign, unknown, strict=True):
        result, expected = await outcome(call), await outcome(same)
        assert (type(result), str(result)) == (SessionUnknown, str(expected))
    assert (await pair.bench.counts())["sessions"] == 2


async def test_a_claim_takes_everything_in_the_order_of_acceptance(pair: Pair) -> None:
    messages = [request(pair.session, rpc_id) for rpc_id in ("9", None, "1", None, "10")]
    for place, message in enumerate(messages):
        await (pair.one, pair.two)[place % 2].inbox.accept([message])
    claimed = await pair.one.inbox.claim(pair.session.ownership)
    assert [item.key for item in claimed] == [message.key for message in messages]
    assert await pair.one.inbox.claim(pair.session.ownership) == []


async def test_only_the_owner_claims(pair: Pair) -> None:
    await pair.two.inbox.accept([request(pair.session)])
    assert isinstance(await outcome(pair.two.inbox.claim(pair.session.ownership)), Fenced)
    other_epoch = replace(pair.session.ownership, epoch=2)
    assert isinstance(await outcome(pair.one.inbox.claim(other_epoch)), Fenced)
    assert await pair.one.inbox.unclaimed() == [pair.session.ownership]
    assert await pair.two.inbox.unclaimed() == []


async def test_claims_of_one_session_that_arrive_together_share_the_messages(pair: Pair) -> None:
    messages = [request(pair.session, str(number)) for number in range(3)]
    for message in messages:
        await pair.two.inbox.accept([message])
    claims = await asyncio.gather(*(pair.one.inbox.claim(pair.session.ownership) for _ in range(5)))
    assert sorted(item.key for claimed in claims for item in claimed) == sorted(message.key for message in messages)


async def test_the_same_request_joins_the_one_that_runs(pair: Pair) -> None:
    first = request(pair.session)
    await pair.one.inbox.accept([first])
    again = await pair.two.inbox.accept([request(pair.session)])
    assert (again.stream, again.joined) == (first.stream, True)
    other_body = request(pair.session, body=b"other")
    assert isinstance(await outcome(pair.two.inbox.accept([other_body])), DuplicateRequest)
    stream = StreamId(IDS.uuid())
    batch = [request(pair.session, rpc_id, stream=stream) for rpc_id in ("1", "2")]
    assert isinstance(await outcome(pair.two.inbox.accept(batch)), DuplicateRequest)
    assert (await pair.two.inbox.accept([request(pair.session, '"1"')])).joined is False
    counts = await pair.bench.counts()
    assert (counts["requests"], counts["streams"]) == (2, 3)


async def test_a_repeat_after_a_broken_exchange_gets_the_stored_answer(pair: Pair) -> None:
    first = await answered(pair, request(pair.session))
    assert first.stream is not None
    await pair.two.log.release(Cursor(first.stream, 1, 0))  # nothing was carried
    again = await pair.one.inbox.accept([request(pair.session)])
    assert (again.stream, again.joined) == (first.stream, True)


async def test_an_id_whose_answer_was_written_to_its_end_is_free(pair: Pair) -> None:
    for _ in range(3):
        claimed = await answered(pair, request(pair.session))
        assert claimed.stream is not None
        await pair.two.log.release(Cursor(claimed.stream, 1, 1))
    assert (await pair.bench.counts())["events"] == 3


async def test_an_id_is_free_for_another_body_once_its_request_is_finished(pair: Pair) -> None:
    first = await answered(pair, request(pair.session))
    assert first.stream is not None
    await pair.two.log.release(Cursor(first.stream, 1, 0))
    again = await pair.two.inbox.accept([request(pair.session, body=b"other")])
    assert again.joined is False


async def test_a_repeat_waits_a_moment_for_the_end_of_the_exchange(pair: Pair) -> None:
    """The client has its answer, and reuses the id before the edge has noted the end."""
    first = await answered(pair, request(pair.session))
    assert first.stream is not None
    call = asyncio.create_task(pair.one.inbox.accept([request(pair.session)]))
    await asyncio.wait({call}, timeout=0.05)
    assert not call.done()
    await pair.two.log.release(Cursor(first.stream, 1, 1))
    assert (await call).joined is False


async def test_the_same_request_at_two_edges_at_once_runs_once(pair: Pair) -> None:
    for number in range(20):
        accepted = await asyncio.gather(
            *(
                node.inbox.accept([request(pair.session, str(number))])
                for node in (pair.one, pair.two)
                for _ in range(3)
            )
        )
        assert len({item.stream for item in accepted}) == 1
        assert [item.joined for item in accepted].count(False) == 1
    assert len(await pair.one.inbox.claim(pair.session.ownership)) == 20


async def test_a_refused_batch_leaves_no_notification(pair: Pair) -> None:
    first = request(pair.session)
    await pair.one.inbox.accept([first])
    batch = [request(pair.session), request(pair.session, None)]
    assert isinstance(await outcome(pair.two.inbox.accept(batch)), DuplicateRequest)
    assert [item.key for item in await pair.one.inbox.claim(pair.session.ownership)] == [first.key]


def posted(pair: Pair, *rpc_ids: str | None, body: bytes = b"{}") -> list[Message]:
    """A batch, as an edge makes it: all of it hangs off one stream."""
    stream = StreamId(IDS.uuid())
    return [request(pair.session, rpc_id, body, stream=stream) for rpc_id in rpc_ids]


async def test_a_batch_that_is_there_is_joined_as_a_whole(pair: Pair) -> None:
    first = posted(pair, "1", None, "2")
    await pair.one.inbox.accept(first)
    before = await pair.bench.counts()
    same: list[tuple[str | None, ...]] = [("1", None, "2"), ("2", "1", None)]
    for ids in same:
        again = await pair.two.inbox.accept(posted(pair, *ids))
        assert (again.stream, again.joined) == (first[0].stream, True)
    others: list[tuple[str | None, ...]] = [
        ("1", "2"), ("1", None, None, "2"), ("1",), ("2", None), ("1", None, "2", "3"), ("3", "2"),
    ]  # fmt: skip
    for ids in others:
        assert isinstance(await outcome(pair.two.inbox.accept(posted(pair, *ids))), DuplicateRequest), ids
    other = [*posted(pair, "1", None), *posted(pair, "2", body=b"other")]
    assert isinstance(await outcome(pair.two.inbox.accept(other)), DuplicateRequest)
    assert await pair.bench.counts() == before
    claimed = await pair.one.inbox.claim(pair.session.ownership)
    assert sorted(item.key for item in claimed) == sorted(item.key for item in first)


async def test_a_finished_batch_gives_its_answers_until_they_were_written(pair: Pair) -> None:
    first = posted(pair, "1", None, "2")
    stream = first[0].stream
    assert stream is not None
    await pair.two.inbox.accept(first)
    claimed = await pair.one.inbox.claim(pair.session.ownership)
    one, two = (item for item in claimed if item.rpc_id is not None)
    await pair.one.log.append(answer(one, 1))
    await pair.two.log.release(Cursor(stream, 1, 1))  # all that there was, and not all that there is to come
    again = await pair.one.inbox.accept(posted(pair, "1", None, "2"))
    assert (again.stream, again.joined) == (stream, True)
    await pair.one.log.append(answer(two, 2))
    again = await pair.one.inbox.accept(posted(pair, "1", None, "2"))
    assert (again.stream, again.joined) == (stream, True)
    others: list[tuple[str | None, ...]] = [("1",), ("1", "2"), ("2", "3")]
    for ids in others:
        assert isinstance(await outcome(pair.two.inbox.accept(posted(pair, *ids))), DuplicateRequest), ids
    attached = await pair.two.log.attach(pair.session.session_id, ANONYMOUS, stream)
    assert isinstance(attached, Attachment)
    await pair.two.log.release(Cursor(stream, attached.sink_epoch, 2))
    free: list[tuple[str | None, ...]] = [("1", None, "2"), ("3",)]
    for ids in free:
        assert (await pair.one.inbox.accept(posted(pair, *ids))).joined is False
    assert (await pair.bench.counts())["requests"] == 7


async def test_ids_of_a_finished_batch_serve_other_requests(pair: Pair) -> None:
    first = posted(pair, "1", "2")
    stream = first[0].stream
    assert stream is not None
    await pair.two.inbox.accept(first)
    for seq, item in enumerate(await pair.one.inbox.claim(pair.session.ownership), start=1):
        await pair.one.log.append(answer(item, seq))
    await pair.two.log.release(Cursor(stream, 1, 0))  # nothing was carried
    other = posted(pair, "2", "1", body=b"other")
    assert (await pair.one.inbox.accept(other)).joined is False
    assert isinstance(await outcome(pair.two.inbox.accept(posted(pair, "1", "2"))), DuplicateRequest)


async def test_the_same_request_twice_in_one_group_leaves_no_stream(pair: Pair) -> None:
    await asyncio.gather(*(pair.two.inbox.accept([request(pair.session)]) for _ in range(3)))
    await asyncio.gather(*(pair.two.inbox.accept([request(pair.session, "2")]) for _ in range(3)))
    assert (await pair.bench.counts())["streams"] == 3


async def test_an_ended_session_is_unknown_everywhere_at_once(pair: Pair) -> None:
    await pair.two.inbox.accept([request(pair.session)])
    assert await pair.two.inbox.end(pair.session.session_id, ANONYMOUS) == pair.session.key
    for node in (pair.one, pair.two):
        for call in (
            node.inbox.find(pair.session.session_id, ANONYMOUS),
            node.inbox.accept([request(pair.session)]),
            node.inbox.end(pair.session.session_id, ANONYMOUS),
        ):
            assert isinstance(await outcome(call), SessionUnknown)
    assert await pair.bench.counts() == dict.fromkeys(HELD, 0)


async def test_a_claim_that_came_to_nobody_is_given_up_and_taken_again(pair: Pair) -> None:
    await pair.two.inbox.accept([request(pair.session)])
    await pair.two.inbox.accept([request(pair.session, "2")])
    first, second = await pair.one.inbox.claim(pair.session.ownership)
    await pair.one.log.append(answer(second))
    seen = await pair.bench.claims(pair.session.key) | {second.key: None}
    for _ in range(2):
        await pair.one.inbox.put_back(pair.session.ownership, seen)
    assert await pair.one.inbox.claimed() == {}
    (again,) = await pair.one.inbox.claim(pair.session.ownership)
    assert again.key == first.key, "a finished one stays finished"
    await pair.one.inbox.put_back(pair.session.ownership, seen)
    assert await pair.one.inbox.claim(pair.session.ownership) == [], "a late try gives up no newer claim"
    for node, epoch in ((pair.one, 2), (pair.two, 1)):
        refused = node.inbox.put_back(replace(pair.session.ownership, epoch=epoch), seen)
        assert isinstance(await outcome(refused), Fenced)


async def test_what_an_owner_works_on_stays_its_own_when_a_term_begins(pair: Pair) -> None:
    for rpc_id in ("1", "2", None):
        await pair.two.inbox.accept([request(pair.session, rpc_id)])
    kept, other, _ = await pair.one.inbox.claim(pair.session.ownership)
    await pair.bench.fail_over()
    now = replace(pair.session.ownership, epoch=pair.session.ownership.epoch + JUMP)
    assert await pair.one.inbox.unfinished([pair.session.key]) == {pair.session.key: {kept.key, other.key}}
    await pair.two.inbox.keep_claims([now], [])  # it is not the owner
    await pair.one.inbox.keep_claims([now], [kept.key])
    assert isinstance(await outcome(pair.one.inbox.claim(pair.session.ownership)), Fenced)
    assert [item.key for item in await pair.one.inbox.claim(now)] == [other.key]
    await pair.one.inbox.keep_claims([now], [])  # a late try gives up nothing that was claimed in this term
    assert await pair.one.inbox.claim(now) == []
    assert [await pair.bench.runs(item.key) for item in (kept, other)] == [1, 1]


async def test_only_requests_that_have_not_ended_are_unfinished(pair: Pair) -> None:
    await answered(pair, request(pair.session))
    running = request(pair.session, "2")
    for message in (running, request(pair.session, None)):
        await pair.two.inbox.accept([message])
    stranger = await opened(pair.two)
    assert await pair.one.inbox.unfinished([pair.session.key, stranger.key]) == {pair.session.key: {running.key}}
    assert await pair.one.inbox.unfinished([]) == {}


async def test_nothing_makes_room_where_there_is_room(pair: Pair) -> None:
    for who in (ANONYMOUS, ME):
        assert await pair.one.inbox.make_room(who) == []
