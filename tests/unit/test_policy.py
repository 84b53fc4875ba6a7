"""What becomes of a request that may have run."""

from __future__ import annotations

import json

import pytest

from pgmcp.inheritance import Heard, Inherited
from pgmcp.protocol import HARMLESS
from pgmcp.session.policy import Fate, fate, undecided
from pgmcp.types import RequestKey
from tests.harness.stores import IDS

KEY = RequestKey(IDS.uuid())


def left(method: str = "tools/call", name: str | None = "pay", *, runs: int = 1, rpc_id: str = "7") -> Inherited:
    return Inherited(KEY, 10, rpc_id, method, name, b"{}", b"", None, 1, runs)


def cancel(request_id: object, position: int, *, claimed: bool = False) -> Heard:
    body = json.dumps({"method": "notifications/cancelled", "params": {"requestId": request_id}}).encode()
    return Heard(position, "notifications/cancelled", body, claimed)


@pytest.mark.parametrize("method", sorted(HARMLESS))
def test_what_only_reads_or_sets_runs_again(method: str) -> None:
    assert fate(left(method, None), (), (), ()) is Fate.AGAIN


@pytest.mark.parametrize("method", ["tasks/cancel", "x/custom", "sampling/createMessage"])
def test_what_nobody_knows_does_not(method: str) -> None:
    assert fate(left(method, None), (), (), ()) is Fate.LOST


@pytest.mark.parametrize(
    ("patterns", "harmless", "wanted"),
    [
        ((), (), Fate.LOST),
        ((), ("pay",), Fate.AGAIN),
        (("pay",), (), Fate.AGAIN),
        (("get_*", "p?y"), (), Fate.AGAIN),
        (("PAY", "pays"), ("Pay",), Fate.LOST),
    ],
)
def test_a_tool_runs_again_when_it_or_the_operator_says_so(
    patterns: tuple[str, ...], harmless: tuple[str, ...], wanted: Fate
) -> None:
    assert fate(left(), (), patterns, harmless) is wanted


@pytest.mark.parametrize("runs", [2, 3])
def test_nothing_runs_more_than_twice(runs: int) -> None:
    assert fate(left(runs=runs), (), ("*",), ("pay",)) is Fate.LOST
    assert fate(left("ping", None, runs=runs), (), (), ()) is Fate.LOST


def test_what_has_no_claim_but_may_have_run_counts_as_one_run() -> None:
    assert fate(left(runs=0), (), ("*",), ()) is Fate.AGAIN
    assert fate(left(runs=0), (), (), ()) is Fate.LOST


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "waiting"])
def test_a_cancel_comes_first_whether_the_former_owner_took_it_or_not(claimed: bool) -> None:
    assert fate(left(), [cancel(7, 11, claimed=claimed)], ("*",), ()) is Fate.CANCELLED


@pytest.mark.parametrize("other", [cancel(7, 9), cancel("7", 11), cancel(8, 11), Heard(12, None, b'{"id":7}', True)])
def test_a_cancel_of_something_else_is_none(other: Heard) -> None:
    assert fate(left(), [other], ("*",), ()) is Fate.AGAIN


def test_the_server_is_asked_of_its_tools_only_where_that_decides() -> None:
    assert undecided([left()], ())
    assert not undecided([left("ping", None), left(runs=2)], ())
    assert not undecided([left()], ("p*",))
