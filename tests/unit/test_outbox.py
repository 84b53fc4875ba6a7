"""What an actor writes, when the database goes on from an earlier moment."""

from __future__ import annotations

import pytest

from pgmcp.clock import Ids
from pgmcp.session.outbox import Outbox
from pgmcp.session.running_requests import Stream
from pgmcp.types import RequestKey, Stand, StreamId

JUMP = 1_000_000


def stream(next_seq: int = 1) -> Stream:
    return Stream(StreamId(Ids().uuid()), next_seq)


def stored(outbox: Outbox, where: Stream, count: int = 1) -> None:
    for _ in range(count):
        outbox.end(outbox.begin(where, b"", None, None, None), stored=True)


@pytest.mark.parametrize(("there", "complete"), [(3, True), (4, True), (2, False), (1, False)])
def test_it_is_complete_if_the_last_event_is_there(there: int, complete: bool) -> None:
    outbox = Outbox(stream())
    stored(outbox, outbox.standalone, 2)
    assert outbox.complete({outbox.standalone.id: Stand(there + JUMP, closed=False)}, JUMP) is complete


def test_a_stream_that_is_gone_is_missed() -> None:
    outbox, own = Outbox(stream()), stream()
    outbox.streams[own.id] = own
    here = {outbox.standalone.id: Stand(1 + JUMP, closed=False)}
    assert outbox.complete(here, JUMP) is False
    assert outbox.complete(here | {own.id: Stand(1 + JUMP, closed=False)}, JUMP) is True


@pytest.mark.parametrize(
    ("stand", "complete"),
    [(Stand(2, closed=True), True), (Stand(1 + JUMP, closed=False), False), (None, None)],
)
def test_a_finished_stream_tells_as_long_as_it_is_kept(stand: Stand | None, complete: bool | None) -> None:
    outbox, done = Outbox(stream()), stream()
    stored(outbox, done)
    stands = {outbox.standalone.id: Stand(1 + JUMP, closed=False)} | ({done.id: stand} if stand else {})
    assert outbox.known() == {outbox.standalone.id, done.id}
    assert outbox.complete(stands, JUMP) is complete


def test_what_is_being_stored_is_no_loss_and_gets_its_number_anew() -> None:
    outbox, own = Outbox(stream()), stream()
    outbox.streams[own.id] = own
    stored(outbox, own)
    first, second = (outbox.begin(own, b"", None, None, None) for _ in range(2))
    stands = {outbox.standalone.id: Stand(1 + JUMP, closed=False), own.id: Stand(3 + JUMP, closed=False)}
    assert outbox.complete(stands, JUMP) is True
    outbox.go_on(stands, JUMP)
    assert (first.stored, second.stored, second.seq) == (True, False, 3 + JUMP)
    assert outbox.begin(own, b"", None, None, None).seq == 4 + JUMP
    assert outbox.begin(outbox.standalone, b"", None, None, None).seq == 1 + JUMP


def test_an_answer_that_came_in_time_is_known_though_nobody_heard_so() -> None:
    outbox, own, key = Outbox(stream()), stream(), RequestKey(Ids().uuid())
    last = outbox.begin(own, b"", key, None, None)
    rest = {outbox.standalone.id: Stand(1 + JUMP, closed=False)}
    assert outbox.answered(rest | {own.id: Stand(1 + JUMP, closed=False)}, JUMP) == set()
    stands = rest | {own.id: Stand(2, closed=True)}
    assert outbox.answered(stands, JUMP) == {key}
    outbox.go_on(stands, JUMP)
    assert last.stored


def test_two_eras_at_once() -> None:
    outbox = Outbox(stream())
    stored(outbox, outbox.standalone)
    stands = {outbox.standalone.id: Stand(2 + 2 * JUMP, closed=False)}
    assert outbox.complete(stands, 2 * JUMP) is True
    outbox.go_on(stands, 2 * JUMP)
    assert outbox.begin(outbox.standalone, b"", None, None, None).seq == 2 + 2 * JUMP
