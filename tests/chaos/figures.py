"""How long clients waited, and how long they may."""

from __future__ import annotations

import os
import statistics

STRICT = "CHAOS_STRICT" in os.environ
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "2"))
"""Of what takes long by its nature: a lease that runs out, three crashes one after the other."""

SLACK, MORE = (1.0, 0.0) if STRICT else (2.0, 0.5)
"""A target is measured in quiet; a machine that does other things too gets so many times it, and so many seconds."""

_figures: dict[str, list[float]] = {}
_targets: dict[str, str] = {}
_middles: dict[str, float] = {}


def took(what: str, seconds: float, most: float | None = None, p50: float | None = None) -> None:
    """Note a figure; fail if it is larger than it may be."""
    _figures.setdefault(what, []).append(seconds)
    _targets[what] = "  ".join(
        f"{name} <= {bound:g}" for name, bound in (("p50", p50), ("max", most)) if bound is not None
    )
    if p50 is not None:
        _middles[what] = p50
    assert most is None or seconds <= _slack(most), f"{what}: {seconds:.2f} s, at most {_slack(most):g}"


def _slack(seconds: float) -> float:
    return seconds * SLACK + MORE


def missed() -> list[str]:
    """The figures whose median is larger than it may be; told when all rounds are over."""
    return [what for what, p50 in _middles.items() if statistics.median(_figures[what]) > _slack(p50)]


def table() -> list[str]:
    """The figures so far, in seconds."""
    width = max(map(len, _figures), default=0)
    lines = [f"{'seconds':{width}}  {'n':>5}  {'p50':>6}  {'max':>6}  target"]
    for what, seconds in _figures.items():
        middle, longest = statistics.median(seconds), max(seconds)
        lines.append(f"{what:{width}}  {len(seconds):5}  {middle:6.3f}  {longest:6.3f}  {_targets[what]}".rstrip())
    return lines if _figures else []
