"""The open streams of one node: whoever ends one session touches nobody else's streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgmcp.clock import Ids
from pgmcp.types import SessionKey, StreamId, alias_of
from pgmcp.web.open_streams import OpenStream, OpenStreams

IDS = Ids()


def stream() -> StreamId:
    return StreamId(IDS.uuid())


def test_an_end_is_heard_by_the_sessions_own_streams_without_a_look_at_others(monkeypatch: pytest.MonkeyPatch) -> None:
    open_streams = OpenStreams()
    with (
        open_streams.subscribe(stream()) as one,
        open_streams.subscribe(stream()) as two,
        open_streams.subscribe(stream()) as other,
    ):
        for open_stream, session in ((one, 1), (two, 1), (other, 2)):
            open_streams.belongs(open_stream, SessionKey(session))

        def scan(_: OpenStreams) -> Iterator[OpenStream]:
            raise AssertionError("all open streams are looked at")

        monkeypatch.setattr(OpenStreams, "__iter__", scan)
        open_streams.end(frozenset({SessionKey(1), SessionKey(3)}))
        assert (one.over, two.over, other.over) == (True, True, False)
        assert one.moved.is_set()
        assert not other.moved.is_set()


def test_nothing_is_left_of_streams_that_were_carried() -> None:
    open_streams = OpenStreams()
    streams = [stream(), stream()]
    with open_streams.subscribe(streams[0]) as one, open_streams.subscribe(streams[1]):
        open_streams.belongs(one, SessionKey(1))
        open_streams.belongs(one, SessionKey(1))
    assert len(open_streams) == 0
    assert not open_streams.has(SessionKey(1))
    assert not any(open_streams.hears(each) for each in streams)
    open_streams.end(frozenset({SessionKey(1)}))


def test_streams_are_woken_by_their_aliases() -> None:
    open_streams, one, two = OpenStreams(), stream(), stream()
    with open_streams.subscribe(one) as ear, open_streams.subscribe(two) as other:
        open_streams.wake([alias_of(one), alias_of(stream())])
        assert (ear.moved.is_set(), other.moved.is_set()) == (True, False)
