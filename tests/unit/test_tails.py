"""The tails of one node: whoever ends one session touches nobody else's streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgmcp.clock import Ids
from pgmcp.types import SessionKey, StreamId, alias_of
from pgmcp.web.tails import Tail, Tails

IDS = Ids()


def stream() -> StreamId:
    return StreamId(IDS.uuid())


def test_an_end_is_heard_by_the_sessions_own_streams_without_a_look_at_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tails = Tails()
    with tails.subscribe(stream()) as one, tails.subscribe(stream()) as two, tails.subscribe(stream()) as other:
        for tail, session in ((one, 1), (two, 1), (other, 2)):
            tails.belongs(tail, SessionKey(session))

        def scan(_: Tails) -> Iterator[Tail]:
            raise AssertionError("all tails are looked at")

        monkeypatch.setattr(Tails, "__iter__", scan)
        tails.end(frozenset({SessionKey(1), SessionKey(3)}))
        assert (one.over, two.over, other.over) == (True, True, False)
        assert one.moved.is_set()
        assert not other.moved.is_set()


def test_nothing_is_left_of_streams_that_were_carried() -> None:
    tails = Tails()
    with tails.subscribe(stream()) as one, tails.subscribe(stream()):
        tails.belongs(one, SessionKey(1))
        tails.belongs(one, SessionKey(1))
    assert (len(tails), tails._by_session, tails._by_stream) == (0, {}, {})
    tails.end(frozenset({SessionKey(1)}))


def test_streams_are_woken_by_their_aliases() -> None:
    tails, one, two = Tails(), stream(), stream()
    with tails.subscribe(one) as ear, tails.subscribe(two) as other:
        tails.wake([alias_of(one), alias_of(stream())])
        assert (ear.moved.is_set(), other.moved.is_set()) == (True, False)
