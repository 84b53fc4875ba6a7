"""How long hypothesis looks: ``HYPOTHESIS_PROFILE=thorough`` for longer."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

QUIET = settings(deadline=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck))

PROFILES = {
    "default": settings(QUIET, max_examples=40, stateful_step_count=30, derandomize=True, database=None),
    "thorough": settings(QUIET, max_examples=3000, stateful_step_count=50),
}


FAILOVERS = {
    "default": settings(QUIET, max_examples=25, derandomize=True, database=None),
    "thorough": settings(QUIET, max_examples=3000),
}


def chosen() -> settings:
    """The settings that the environment asks for."""
    return PROFILES[os.environ.get("HYPOTHESIS_PROFILE", "default")]


def failovers() -> settings:
    """The same for what is about nothing but failovers."""
    return FAILOVERS[os.environ.get("HYPOTHESIS_PROFILE", "default")]
