"""What server code keeps of its session."""

from __future__ import annotations

from typing import Any

import pytest

from pgmcp import session_state
from pgmcp.errors import Fenced, NoSession, StateRefused
from pgmcp.session.state import KEYS, VALUE_BYTES, SessionState
from pgmcp.types import JournalEntry


class Scene:
    def __init__(self, **kept: bytes) -> None:
        self.written: list[JournalEntry] = []
        self.fenced = False
        self.state = SessionState("s", self.write, restored=False, kept=kept)

    async def write(self, entry: JournalEntry) -> None:
        if self.fenced:
            raise Fenced
        self.written.append(entry)


async def test_what_is_put_is_stored_and_there() -> None:
    scene = Scene(old=b'{"a":1}')
    await scene.state.set("new", [1, None, "ü"])
    assert (await scene.state.get("old"), await scene.state.get("new"), await scene.state.get("none", 5)) == (
        {"a": 1},
        [1, None, "ü"],
        5,
    )
    assert scene.written == [JournalEntry("state", "new", b'[1, null, "\\u00fc"]')]
    await scene.state.delete("old")
    await scene.state.delete("never")
    assert await scene.state.get("old") is None
    assert scene.written[1:] == [JournalEntry("state", "old")]


async def test_values_are_the_callers_own() -> None:
    scene, value = Scene(), [1]
    await scene.state.set("list", value)
    value.append(2)
    (await scene.state.get("list")).append(3)
    assert await scene.state.get("list") == [1]


async def test_what_was_not_stored_is_not_there() -> None:
    scene = Scene(kept=b"1")
    scene.fenced = True
    with pytest.raises(Fenced):
        await scene.state.set("kept", 2)
    with pytest.raises(Fenced):
        await scene.state.delete("kept")
    assert await scene.state.get("kept") == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", 1),
        ("x" * 201, 1),
        ("a\0b", 1),
        ("\ud800", 1),
        ("big", "x" * VALUE_BYTES),
        ("set", {1}),
        ("object", object()),
    ],
    ids=["no key", "long key", "NUL", "surrogate", "large", "set", "object"],
)
async def test_what_cannot_be_kept_is_refused_and_nothing_is_stored(key: str, value: Any) -> None:
    scene = Scene()
    with pytest.raises(StateRefused):
        await scene.state.set(key, value)
    assert scene.written == []


async def test_there_is_a_bound_and_known_keys_may_change_at_it() -> None:
    scene = Scene()
    for number in range(KEYS):
        await scene.state.set(f"k{number}", number)
    with pytest.raises(StateRefused):
        await scene.state.set("one more", 1)
    await scene.state.set("k0", "changed")
    await scene.state.delete("k1")
    await scene.state.set("one more", 1)


def test_outside_of_a_session_there_is_none() -> None:
    with pytest.raises(NoSession, match="is for handlers of a server"):
        session_state()
