"""The primary is killed under load and its standby promoted: with synchronous replication nothing is lost."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest

from tests.harness.cluster import eventually, tables_of
from tests.harness.servers import Server
from tests.loss.load import load, note, rounded, unmoved

pytestmark = pytest.mark.timeout(240)


async def synchronous(primary: Server) -> None:
    """From now on the primary's commits wait for the standby."""
    async with tables_of(primary.url()) as tables:
        await tables.execute("alter system set synchronous_standby_names = 'standby'")
        await tables.value("select pg_reload_conf()")
        await eventually(
            lambda: tables.value("select true from pg_stat_replication where sync_state = 'sync'"), "it is synchronous"
        )


async def test_the_primary_is_killed_under_load(primary, standby, cluster, truth):
    await synchronous(primary)
    with cluster(primary.url(standby)) as (_, nginx):
        async with load([nginx.mcp_url], truth, each=3) as work:
            await asyncio.sleep(1.5)
            killed = time.monotonic()
            primary.kill()
            await asyncio.to_thread(standby.promote)
            back = time.monotonic()
            await work.all_served_since(back, 60)
            await unmoved(standby.url(), 3)
        work.check()
    served = {"promoted after": round(back - killed, 2), "served after": rounded(work.served_after(back))}
    note("synchronous failover", {**served, "calls": len(work.calls), "bad": work.failures})
    assert not work.failures
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncpg.connect(primary.url(), timeout=5)
