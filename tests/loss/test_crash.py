"""PostgreSQL crashes, and comes back at once or later, under load: no session, no call and no notification is lost.

``LOSS_OUTAGE`` says how many seconds it is away (5 s; ``LOSS_OUTAGE=60`` for the figures of docs/guarantees.md).
"""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from tests.harness.cluster import eventually
from tests.loss.load import load, note, rounded, unmoved

OUTAGE = float(os.environ.get("LOSS_OUTAGE", "5"))
pytestmark = pytest.mark.timeout(240 + 2 * OUTAGE)


async def test_postgres_crashes_under_load(primary, cluster, truth):
    """Twice: once it is back at once, once it is away for a while."""
    with cluster(primary.url()) as (_, nginx):
        async with load([nginx.mcp_url], truth, each=3) as work:
            for outage in (0.0, OUTAGE):
                await asyncio.sleep(1.5)
                primary.crash()
                await asyncio.sleep(outage)
                primary.start(wait=False)
                await eventually(lambda: primary.state == "ready", "PostgreSQL is back", 20)
                back = time.monotonic()
                await work.all_served_since(back, 60)
                note(f"crash, {outage:g} s away", {"served after": rounded(work.served_after(back))})
                await unmoved(primary.url(), 3)
        work.check()
    note("crashes", {"calls": len(work.calls), "bad": work.failures})
    if OUTAGE < 20:
        assert not work.failures
    assert all("503" in failure or "Server returned an error" in failure for failure in work.failures), work.failures
