"""What an actor writes, when the database goes on from an earlier moment."""

from __future__ import annotations

import pytest

from pgmcp.clock import Ids
from pgmcp.session.calls import Stream
from pgmcp.session.writing import Writing
from pgmcp.types import RequestKey, Stand, StreamId

JUMP = 1_000_000


def stream(next_seq: int = 1) -> Stream:
    return Stream(StreamId(Ids().uuid()), next_seq)


def stored(writing: Writing, where: Stream, count: int = 1) -> None:
    for _ in range(count):
        writing.end(writing.begin(where, b"", None, None, None), stored=True)


@pytest.mark.parametrize(("there", "complete"), [(3, True), (4, True), (2, False), (1, False)])
def test_it_is_complete_if_the_last_event_is_there(there: int, complete: bool) -> None:
    writing = Writing(stream())
    stored(writing, writing.standalone, 2)
    assert writing.complete({writing.standalone.id: Stand(there + JUMP, closed=False)}, JUMP) is complete


def test_a_stream_that_is_gone_is_missed() -> None:
    writing, own = Writing(stream()), stream()
    writing.streams[own.id] = own
    here = {writing.standalone.id: Stand(1 + JUMP, closed=False)}
    assert writing.complete(here, JUMP) is False
    assert writing.complete(here | {own.id: Stand(1 + JUMP, closed=False)}, JUMP) is True


@pytest.mark.parametrize(
    ("stand", "complete"),
    [(Stand(2, closed=True), True), (Stand(1 + JUMP, closed=False), False), (None, None)],
)
def test_a_finished_stream_tells_as_long_as_it_is_kept(stand: Stand | None, complete: bool | None) -> None:
    writing, done = Writing(stream()), stream()
    stored(writing, done)
    stands = {writing.standalone.id: Stand(1 + JUMP, closed=False)} | ({done.id: stand} if stand else {})
    assert writing.known() == {writing.standalone.id, done.id}
    assert writing.complete(stands, JUMP) is complete


def test_what_is_being_stored_is_no_loss_and_gets_its_number_anew() -> None:
    writing, own = Writing(stream()), stream()
    writing.streams[own.id] = own
    stored(writing, own)
    first, second = (writing.begin(own, b"", None, None, None) for _ in range(2))
    stands = {writing.standalone.id: Stand(1 + JUMP, closed=False), own.id: Stand(3 + JUMP, closed=False)}
    assert writing.complete(stands, JUMP) is True
    writing.go_on(stands, JUMP)
    assert (first.stored, second.stored, second.seq) == (True, False, 3 + JUMP)
    assert writing.begin(own, b"", None, None, None).seq == 4 + JUMP
    assert writing.begin(writing.standalone, b"", None, None, None).seq == 1 + JUMP


def test_an_answer_that_came_in_time_is_known_though_nobody_heard_so() -> None:
    writing, own, key = Writing(stream()), stream(), RequestKey(Ids().uuid())
    last = writing.begin(own, b"", key, None, None)
    rest = {writing.standalone.id: Stand(1 + JUMP, closed=False)}
    assert writing.answered(rest | {own.id: Stand(1 + JUMP, closed=False)}, JUMP) == set()
    stands = rest | {own.id: Stand(2, closed=True)}
    assert writing.answered(stands, JUMP) == {key}
    writing.go_on(stands, JUMP)
    assert last.stored


def test_two_eras_at_once() -> None:
    writing = Writing(stream())
    stored(writing, writing.standalone)
    stands = {writing.standalone.id: Stand(2 + 2 * JUMP, closed=False)}
    assert writing.complete(stands, 2 * JUMP) is True
    writing.go_on(stands, 2 * JUMP)
    assert writing.begin(writing.standalone, b"", None, None, None).seq == 2 + 2 * JUMP
