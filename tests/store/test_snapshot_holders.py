"""Who holds an old snapshot is named once, and only as far as the role may see it."""

from __future__ import annotations

import logging

import asyncpg
import pytest

from pgmcp.store.snapshot_holders import SnapshotHolders
from tests.harness.stores import store


async def test_a_holder_is_named_once(database: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pgmcp.store.snapshot_holders")
    async with store(database) as node:
        holders = SnapshotHolders(node.database, old=0.0)
        await holders.look()
        assert caplog.messages == []
        other = await asyncpg.connect(database, timeout=10, server_settings={"application_name": "nightly"})
        try:
            await other.execute("begin isolation level repeatable read; select 1 from pgmcp.sessions")
            pid = other.get_server_pid()
            for _ in range(3):
                await holders.look()
            [said] = caplog.messages
            assert f"connection {pid} (application 'nightly'" in said
            assert "idle in transaction" in said
            assert f"pg_terminate_backend({pid})" in said
            await other.execute("commit")
            await holders.look()
            await holders.look()
            assert caplog.messages[1:] == ["no old snapshot holds the tables any more"]
        finally:
            await other.close()


async def test_what_is_young_is_not_named(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with store(database) as node:
        other = await asyncpg.connect(database, timeout=10)
        try:
            await other.execute("begin; create table public.elsewhere (n integer)")
            await SnapshotHolders(node.database).look()
            assert caplog.messages == []
            await SnapshotHolders(node.database, old=0.0).look()  # it has no snapshot, but it wrote
            assert "an old snapshot holds the tables" in caplog.text
        finally:
            await other.close()
