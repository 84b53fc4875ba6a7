"""Four nodes that the tests of this folder hit in turn, and the figures at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from pytest_postgresql.executors import NoopExecutor

from tests.chaos.figures import missed, table
from tests.chaos.stage import Stage
from tests.conftest import temporary_database
from tests.harness.cluster import tables_of


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def chaos_database(template: NoopExecutor) -> AsyncIterator[str]:
    """The address of the folder's database."""
    async for address in temporary_database(template.template_dbname):
        yield address


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def shared_stage(chaos_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """Four nodes with default settings."""
    async with tables_of(chaos_database) as tables:
        stage = Stage(chaos_database, tables, tmp_path_factory.mktemp("chaos"))
        try:
            stage.add(4)
            yield stage
        finally:
            await stage.close()


@pytest_asyncio.fixture(loop_scope="package")
async def stage(shared_stage: Stage) -> AsyncIterator[Stage]:
    """The cluster, whole before each test; after it, the truth and the tables are looked at."""
    await shared_stage.ready()
    yield shared_stage
    for node in shared_stage.nodes:
        node.resume()
    await shared_stage.ready()
    await shared_stage.check()
    await shared_stage.end_sessions()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures."""
    if lines := table():
        terminalreporter.section("chaos")
        terminalreporter.write_line("\n".join(lines))
        for what in missed():
            terminalreporter.write_line(f"p50 is too large: {what}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A median that is too large fails the run."""
    if session.exitstatus == pytest.ExitCode.OK and missed():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
