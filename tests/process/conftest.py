"""An installed pgmcp, for the tests of what users do with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.wheel import installed


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of an installed pgmcp."""
    return installed(tmp_path_factory.mktemp("wheel"))
