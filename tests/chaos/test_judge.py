"""The judge finds what is wrong with a history, and nothing wrong with a right one."""

from __future__ import annotations

import pytest

from tests.chaos.judge import Call, judge


def call(began: float, ended: float, told: int | None, *, session: str = "a", fault: str = "") -> Call:
    return Call(session, f"{began:g}", began, ended, told, fault)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [call(0, 1, 1), call(2, 3, 2)],
        [call(0, 5, 2), call(1, 4, 1), call(2, 3, 3)],  # side by side: in whatever order
        [call(0, 1, 1), call(2, 9, None), call(3, 4, 2)],  # it has not run
        [call(0, 1, 1), call(2, 9, None), call(3, 4, 3)],  # it has
        [call(0, 1, None), call(2, 3, 1), call(4, 5, 3)],  # it ran later
        [call(0, 1, 1), call(0, 1, 1, session="b"), call(2, 3, 2), call(2, 3, 2, session="b")],
    ],
)
def test_nothing_is_wrong(history: list[Call]) -> None:
    assert judge(history) == []


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([call(0, 2, 1), call(1, 3, 1)], "told 2 times"),
        ([call(0, 1, 1), call(2, 3, 1)], "told 2 times"),
        ([call(0, 1, 2), call(2, 3, 1)], "smaller"),
        ([call(0, 1, 1), call(0, 2, 3), call(1, 2, 4), call(3, 4, 2)], "smaller"),
        ([call(0, 9, 1), call(1, 2, 3), call(3, 4, 2)], "smaller"),  # an open call hides nothing
        ([call(0, 1, 1), call(2, 3, 3)], "nobody was told [2]"),
        ([call(0, 1, 2)], "nobody was told [1]"),
        ([call(0, 1, 1), call(2, 3, None), call(4, 5, 4)], "nobody was told [2, 3]"),
        ([call(0, 1, None), call(0, 1, 2, session="b")], "session b: nobody was told [1]"),  # each for itself
        ([call(0, 1, 1), call(2, 3, None, fault="404")], "404"),
        ([call(0, 1, 1), call(2, 99, None, fault="no end")], "no end"),
    ],
)
def test_it_is_found(history: list[Call], words: str) -> None:
    wrong = judge(history)
    assert len(wrong) == 1 or words == "told 2 times"
    assert words in wrong[0]
    assert judge(history[::-1]) != []
