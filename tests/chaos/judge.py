"""What a history of calls proves, judged from outside: by what clients were told, and when.

Each call adds one to a number that its session keeps, and tells the sum. So of each session it must hold that
- no sum was told twice,
- a call that began after another one had ended tells more than that,
- sums that nobody was told are no more than the calls whose clients know no outcome,
- no call saw what none may see: a session that is gone, an answer that cannot be had, no end at all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """One call as its client saw it; times are of one clock.

    Args:
        told: the sum; None if the client was told that nobody knows whether the call has run.
        fault: what no client may see.
        tries: how often it was sent.
    """

    session: str
    name: str
    began: float
    ended: float
    told: int | None
    fault: str = ""
    tries: int = 1

    def __str__(self) -> str:
        outcome = self.fault or ("unknown" if self.told is None else self.told)
        return f"{self.name} [{self.began:.3f}, {self.ended:.3f}] {outcome} ({self.tries})"


def judge(history: Iterable[Call]) -> list[str]:
    """What is wrong with a history; nothing if it is right."""
    sessions: dict[str, list[Call]] = defaultdict(list)
    for call in history:
        sessions[call.session].append(call)
    return [
        f"session {session}: {wrong}"
        for session, calls in sessions.items()
        for check in (_faults, _twice, _stale, _untold)
        for wrong in check(calls)
    ]


def _faults(calls: Sequence[Call]) -> list[str]:
    return [f"never to be seen: {call}" for call in calls if call.fault]


def _twice(calls: Sequence[Call]) -> list[str]:
    times = Counter(call.told for call in calls if call.told is not None)
    return [
        f"told {count} times: {', '.join(str(call) for call in calls if call.told == told)}"
        for told, count in times.items()
        if count > 1
    ]


def _stale(calls: Sequence[Call]) -> list[str]:
    """Look at each begin for the largest sum that had been told by then."""
    told = [call for call in calls if call.told is not None]
    ended, wrong = sorted(told, key=lambda call: call.ended), []
    largest: Call | None = None
    at = 0
    for call in sorted(told, key=lambda call: call.began):
        while at < len(ended) and ended[at].ended < call.began:
            if largest is None or _sum(ended[at]) > _sum(largest):
                largest = ended[at]
            at += 1
        if largest is not None and _sum(call) < _sum(largest):
            wrong.append(f"smaller than what had been told before it began: {call} after {largest}")
    return wrong


def _untold(calls: Sequence[Call]) -> list[str]:
    told = {call.told for call in calls if call.told is not None}
    unknown = [call for call in calls if call.told is None]
    untold = sorted(set(range(1, max(told, default=0) + 1)) - told)
    if len(untold) <= len(unknown):
        return []
    return [f"nobody was told {untold}, but only {len(unknown)} outcomes are unknown: {', '.join(map(str, unknown))}"]


def _sum(call: Call) -> int:
    assert call.told is not None
    return call.told
