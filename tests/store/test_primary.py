"""Of several servers the first is taken that answers and takes writes, soon."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable
from pgmcp.settings import Settings
from pgmcp.store.connection.one_shot import connect as command
from pgmcp.store.connection.primary import STAGGER_SECONDS, connect
from pgmcp.store.database import Database
from tests.harness.processes import free_ports
from tests.harness.proxy import Proxy, proxied


def several(database: str, *ports: int) -> str:
    """The database's address, at these ports and then at its own."""
    at = urlsplit(database)
    login, hosts = at.netloc.rpartition("@")[0], [*(f"127.0.0.1:{port}" for port in ports), f"127.0.0.1:{at.port}"]
    return at._replace(netloc=f"{login}@{','.join(hosts)}").geturl()


@pytest.fixture
async def before(database: str) -> AsyncIterator[tuple[Proxy, int]]:
    """A way to the database that a test can close."""
    async with proxied(database) as (proxy, through):
        yield proxy, int(urlsplit(through).port or 0)


@pytest.mark.parametrize("weather", ["black_hole", "stalling", "refusing"])
async def test_a_server_that_does_not_answer_keeps_nobody_from_the_next_one(
    database: str, before: tuple[Proxy, int], weather: str
) -> None:
    proxy, port = before
    setattr(proxy, weather, True)
    start = time.monotonic()
    connection = await connect(several(database, free_ports(1)[0], port), timeout=5)
    took = time.monotonic() - start
    assert await connection.fetchval("select 1") == 1
    await connection.close()
    assert took < STAGGER_SECONDS + 1


async def test_one_that_answers_late_is_still_taken_when_there_is_no_other(
    database: str, before: tuple[Proxy, int]
) -> None:
    proxy, port = before
    proxy.delay = 2 * STAGGER_SECONDS / 3  # the login takes several round trips
    address = several(database, port).rsplit(",", 1)
    connection = await connect(f"{address[0]},127.0.0.1:{free_ports(1)[0]}/{address[1].partition('/')[2]}", timeout=20)
    assert await connection.fetchval("select 1") == 1
    connection.terminate()


async def test_nobody_is_found_and_the_reasons_are_said(database: str, before: tuple[Proxy, int]) -> None:
    proxy, port = before
    proxy.refusing = True
    closed = free_ports(1)[0]
    address = several(database, port, closed).replace("@", "-no-such-password@", 1)
    with pytest.raises(ConnectionError) as found:
        await connect(address, timeout=5)
    for part in (f":{port}", f":{closed}", "password authentication failed"):
        assert part in str(found.value)
    assert "no-such-password" not in str(found.value)
    with pytest.raises(DatabaseUnavailable, match="password authentication failed"):
        await command(address)


async def test_nobody_answers_and_the_time_is_over(database: str, before: tuple[Proxy, int]) -> None:
    proxy, port = before
    proxy.stalling = True
    address = several(database, port, port).rpartition(",")[0] + "/postgres"
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        await connect(address, timeout=1)
    assert time.monotonic() - start < 2


async def test_a_server_that_is_read_only_is_not_taken(database: str) -> None:
    name = urlsplit(database).path.strip("/")
    hand = await asyncpg.connect(database)
    await hand.execute(f"alter database {name} set default_transaction_read_only = on")
    await hand.close()
    address = several(database, int(urlsplit(database).port or 0))
    with pytest.raises(ConnectionError, match="takes writes"):
        await connect(address, timeout=5)
    with pytest.raises(DatabaseUnavailable, match="takes writes"):
        await command(address)


async def test_a_pool_that_is_cut_off_finds_the_next_server_with_its_first_statement(
    database: str, before: tuple[Proxy, int]
) -> None:
    """Each of its idle connections would take as long as a statement may to find out."""
    proxy, port = before
    pool = Database(Settings(database_url=several(database, port), statement_timeout=0.5), Clock())
    await pool.open()
    try:
        for _ in range(3):
            await pool.fetch("ready_nodes", None)
        proxy.black_hole = True
        start = time.monotonic()
        assert await pool.persist("ready_nodes", None, patience=10) == []
        assert time.monotonic() - start < 0.5 + STAGGER_SECONDS + 1
    finally:
        proxy.black_hole = False
        proxy.cut_all()
        await pool.close()
