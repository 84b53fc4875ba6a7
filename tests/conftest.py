"""One PostgreSQL for the whole run, and a database of its own for each test that asks for one.

``PGMCP_TEST_PG_BIN`` chooses the server's binaries and so its version, ``PGMCP_TEST_PG`` a server that runs already (a
superuser's URL).
``PGMCP_TEST_POOLER=1`` puts pgbouncer in transaction mode before everything but the line, in every test that runs nodes
or stores in its own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg
import pytest
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.factories import postgresql_noproc

from pgmcp.embedded import EmbeddedPostgres
from pgmcp.store.schema import migrations
from tests.harness.pooler import SWITCH

ADDRESS = "PGMCP_TEST_PG"
SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "synchronous_commit": "on",  # nodes lift it anyway; behind a pooler that is the slower way
}
ROOMY = 2 << 30  # bytes


def pytest_configure(config: pytest.Config) -> None:
    """Start the server, in the run's first process only, and in its main thread (the server ends with that)."""
    if hasattr(config, "workerinput") or os.environ.get(ADDRESS):
        return
    if binaries := os.environ.get("PGMCP_TEST_PG_BIN"):
        os.environ["PGMCP_PG_BIN"] = binaries
    memory = Path("/dev/shm")  # making a database takes 10 ms there and up to 500 ms on a slow disk
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > ROOMY
    folder = (memory if roomy else Path(tempfile.gettempdir())) / f"pgmcp-test-{secrets.token_hex(8)}"
    server = EmbeddedPostgres(folder, settings=SETTINGS, durable=False)
    os.environ[ADDRESS] = server.start()
    asyncio.run(_log_in_quickly(os.environ[ADDRESS]))

    def stop() -> None:
        os.environ.pop(ADDRESS, None)
        server.stop()
        shutil.rmtree(server.home, ignore_errors=True)

    config.add_cleanup(stop)


async def _log_in_quickly(address: str) -> None:
    """Thousands of connections are opened, and each would hash 4096 times at both ends; since PostgreSQL 16."""
    at = urlsplit(address)
    connection = await asyncpg.connect(address)
    with contextlib.suppress(asyncpg.UndefinedObjectError):
        await connection.execute("set scram_iterations = 1")
        await connection.execute(f"alter role \"{at.username}\" password '{unquote(at.password or '')}'")
    await connection.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side (``-n``), those of a file stay together, and so do those that share nodes."""
    for item in items:
        shares = "shared_stage" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("chaos" if shares else item.path.name))


def migrate(*, host: str, port: int, user: str, password: str, dbname: str, **_: Any) -> None:
    """Bring pytest-postgresql's template to the schema of this build."""
    migrations.upgrade(f"postgresql://{user}:{password}@{host}:{port}/{dbname}", "pgmcp")


@pytest.fixture(scope="session")
def postgres() -> SimpleNamespace:
    """The run's server, in the shape that pytest-postgresql asks for."""
    at = urlsplit(os.environ[ADDRESS])
    return SimpleNamespace(
        host=at.hostname,
        port=at.port,
        user=at.username,
        password=at.password,
        options="",
        maintenance_dbname="postgres",
        template_dbname=None,
    )


template = postgresql_noproc(depends_on="postgres", dbname="pgmcp", load=[migrate])


async def temporary_database(origin: str) -> AsyncIterator[str]:
    """A copy of the database ``origin`` for as long as a test runs; file_copy takes a third of the default's time."""
    server = os.environ[ADDRESS]
    name = f"test_{secrets.token_hex(8)}"
    admin = await asyncpg.connect(server)
    try:
        await admin.execute(f'create database {name} template "{origin}" strategy file_copy')
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
        await admin.execute(f"drop database {name} with (force)")
    finally:
        await admin.close()


@pytest.fixture
async def database(template: NoopExecutor) -> AsyncIterator[str]:
    """The address of a migrated database of the test's own."""
    async for address in temporary_database(template.template_dbname):
        yield address


@pytest.fixture
async def empty_database() -> AsyncIterator[str]:
    """The address of a database of the test's own in which nothing is."""
    async for address in temporary_database("template1"):
        yield address


@pytest.fixture(params=["straight", "pooled"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test twice: straight to PostgreSQL, and with everything but the line through a transaction pooler."""
    if request.param == "pooled":
        monkeypatch.setenv(SWITCH, "1")
