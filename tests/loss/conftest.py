"""Servers that may be killed, and three nodes behind nginx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from pgmcp.store.schema import migrations
from tests.harness.nginx import Nginx
from tests.harness.processes import NodeProcess, nodes
from tests.harness.servers import Server, Site, site
from tests.loss.load import TARGET

Cluster = Callable[..., AbstractContextManager[tuple[list[NodeProcess], Nginx]]]


@pytest.fixture
def place() -> Iterator[Site]:
    """Where a test's servers are."""
    with site() as made:
        yield made


@pytest.fixture
def primary(place: Site) -> Iterator[Server]:
    """A server with the tables of pgmcp."""
    server = Server.fresh(place)
    server.start()
    try:
        migrations.upgrade(server.url(), "pgmcp")
        yield server
    finally:
        server.stop()


@pytest.fixture
def standby(primary: Server) -> Iterator[Server]:
    """A standby that follows the primary."""
    server = primary.standby("standby")
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Where each run of a tool leaves a line."""
    path = tmp_path / "truth"
    path.touch()
    return path


@pytest.fixture
def cluster(truth: Path, tmp_path: Path) -> Cluster:
    """Three nodes on a database, behind nginx."""

    @contextmanager
    def run(url: str, **settings: object) -> Iterator[tuple[list[NodeProcess], Nginx]]:
        env = {"TRUTH": str(truth), **{f"PGMCP_{name.upper()}": str(value) for name, value in settings.items()}}
        with (
            nodes(TARGET, 3, database_url=url, log_dir=tmp_path, env=env) as members,
            Nginx([node.port for node in members], directory=tmp_path / "nginx") as nginx,
        ):
            yield members, nginx

    return run
