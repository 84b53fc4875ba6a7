"""A rolling restart of every node under load, behind an nginx that learns of it from refused connections only (G10).

``ROLLING_ROUNDS`` says how often every node is restarted, ``ROLLING_LONG`` how many seconds the long calls take; the
drain's limit is twice that and a margin for a machine that others use (25 s for calls of 10 s).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.harness.load import TARGET, Load, Rotation, check, figures_of
from tests.harness.nginx import Nginx
from tests.harness.processes import REPOSITORY, nodes

ROUNDS = int(os.environ.get("ROLLING_ROUNDS", "1"))
LONG = float(os.environ.get("ROLLING_LONG", "3"))
LIMIT = 2 * LONG + 5
FIGURES = REPOSITORY / ".cache/rolling.json"

pytestmark = pytest.mark.timeout(120 + ROUNDS * (60 + 9 * LIMIT))


async def test_a_rolling_restart_fails_no_call_and_loses_no_notification(database: str, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    truth.touch()
    env = {
        "TRUTH": str(truth),
        "PGMCP_DRAIN_NOTICE": "0.5",
        "PGMCP_DRAIN_LIMIT": str(LIMIT),
    }
    with (
        nodes(TARGET, 3, database_url=database, log_dir=tmp_path, env=env) as members,
        Nginx([node.port for node in members], plain=True, directory=tmp_path / "nginx") as nginx,
    ):
        rotation = Rotation(nginx, LIMIT)
        async with Load(nginx, tmp_path, LONG) as load:
            for _ in range(ROUNDS):
                for node in members:
                    await rotation.restart(node)
            saw = await load.finish()
        left = [round(seconds, 1) for seconds in rotation.left]
        figures = {"rounds": ROUNDS, **figures_of(saw, nginx), "left after": left}
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1))
        check(saw, figures, truth)
