"""An installed pgmcp, for the tests of what users do with one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from pytest_postgresql.executors import NoopExecutor

from tests.conftest import temporary_database
from tests.harness.wheel import installed


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of an installed pgmcp."""
    return installed(tmp_path_factory.mktemp("wheel"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_database(template: NoopExecutor) -> AsyncIterator[str]:
    """The address of a migrated database of the module's own."""
    async for address in temporary_database(template.template_dbname):
        yield address
