"""The primary is killed under load and its standby promoted, twice.

With synchronous replication nothing is lost. Without, the last commits are: then clients may hear that an outcome is
not known, or miss a notification; nothing else goes wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.harness.cluster import tables_of
from tests.harness.processes import free_ports
from tests.harness.servers import Server
from tests.harness.waiting import eventually
from tests.loss.conftest import Cluster
from tests.loss.load import Load, load, note, rounded, unmoved

pytestmark = pytest.mark.timeout(240)

UNKNOWN = "nobody knows whether it took effect"


async def synchronous(primary: Server) -> None:
    """From now on the primary's commits wait for the standby."""
    async with tables_of(primary.url()) as tables:
        await tables.execute("alter system set synchronous_standby_names = 'standby'")
        await tables.value("select pg_reload_conf()")
        await eventually(
            lambda: tables.value("select true from pg_stat_replication where sync_state = 'sync'"), "it is synchronous"
        )


async def fail_over(primary: Server, standby: Server, work: Load, what: str) -> None:
    """Kill the primary, promote the standby, and wait until everybody is served again."""
    before, killed = len(work.failures), time.monotonic()
    primary.kill()
    await asyncio.to_thread(standby.promote)
    back = time.monotonic()
    await work.all_served_since(back, 60)
    await unmoved(standby.url(), 3)
    figures = {"promoted after": round(back - killed, 2), "served after": rounded(work.served_after(back))}
    note(what, {**figures, "calls": len(work.calls), "bad": work.failures[before:]})


async def test_the_primary_is_killed_under_load(
    primary: Server, standby: Server, cluster: Cluster, truth: Path
) -> None:
    [third] = free_ports(1)
    await synchronous(primary)
    with cluster(primary.url(standby.port, third)) as (_, nginx):
        async with load([nginx.mcp_url], truth, each=3) as work:
            await work.all_served_since(time.monotonic())
            await fail_over(primary, standby, work, "synchronous failover")
            assert not work.failures

            last = await asyncio.to_thread(standby.standby, "last", third)
            last.start()
            try:
                await last.has_all_of(standby)
                await last.detach()
                await work.all_served_since(time.monotonic())  # these commits will be lost
                await fail_over(standby, last, work, "failover that loses a second of commits")
                async with tables_of(last.url()) as tables:
                    assert await tables.value("select term from pgmcp.history") == 2
                    work.working = False
                    await eventually(lambda: work.ended, "everybody ends", 60)
            finally:
                last.stop()
    assert max(work.started.values()) == 1
    assert all(UNKNOWN in failure for failure in work.failures), work.failures
    for client in work.clients:
        assert max(Counter(client.told).values()) == 1
        assert set(client.told) <= {f"test://{call.text}" for call in client.calls}
