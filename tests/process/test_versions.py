"""Two builds and two schemas side by side, under load, from the old one to the new one without a failed call.

The newer build is this one with two migrations more (``tests/harness/builds.py``), installed beside it and run as
processes of its own: its nodes do without a column that this build writes, and its contract step drops that column.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import asyncpg
import pytest

from pgmcp.store.schema.revisions import head
from tests.harness.builds import newer_build
from tests.harness.cluster import tables_of
from tests.harness.load import TARGET, Load, Rotation, Seen, check, figures_of
from tests.harness.nginx import Nginx
from tests.harness.processes import REPOSITORY, NodeProcess, free_ports, nodes
from tests.harness.stores import Watcher
from tests.harness.waiting import eventually

LONG = 1.0
LIMIT = 2 * LONG + 5
FIGURES = REPOSITORY / ".cache/versions.json"

pytestmark = pytest.mark.timeout(120 + 30 * LIMIT)


async def upgrade(database: str, env: Mapping[str, str], *options: str) -> tuple[int | None, str]:
    """``pgmcp db upgrade`` of a build: its exit code, and what it says."""
    command = (sys.executable, "-m", "pgmcp", "db", "upgrade", *options)
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": "", **env, "PGMCP_DATABASE_URL": database},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(60):
            said, _ = await process.communicate()
    except BaseException:
        process.kill()
        raise
    return process.returncode, said.decode()


async def upgrade_while_somebody_reads(database: str, env: Mapping[str, str]) -> tuple[int | None, str]:
    """The same, while a transaction is open that has read ``sessions``, until the upgrade gave way to others once."""
    reader, watcher = [await asyncpg.connect(database) for _ in range(2)]
    change = reader.transaction()
    await change.start()
    await reader.fetch("select * from pgmcp.sessions")
    upgrading = asyncio.create_task(upgrade(database, env))
    watch = Watcher(watcher)

    async def waits() -> bool:
        return bool(await watch.waiting("ALTER TABLE pgmcp.sessions"))

    async def gave_way() -> bool:
        return not await waits()

    await eventually(waits, "the upgrade waits for the reader", 30)
    await eventually(gave_way, "it lets the others go first", 30)
    assert not upgrading.done()
    await change.rollback()
    outcome = await upgrading
    for connection in (reader, watcher):
        await connection.close()
    return outcome


async def test_an_upgrade_with_both_builds_at_work_fails_no_call(database: str, tmp_path: Path) -> None:
    newer = newer_build(tmp_path / "newer")
    truth = tmp_path / "truth"
    truth.touch()
    env = {"TRUTH": str(truth), "PGMCP_DRAIN_NOTICE": "0.5", "PGMCP_DRAIN_LIMIT": str(LIMIT)}
    saw: list[Seen] = []
    with (
        nodes(TARGET, 3, database_url=database, log_dir=tmp_path, env=env) as members,
        Nginx([node.port for node in members], plain=True, skips=2, directory=tmp_path / "nginx") as nginx,
    ):
        rotation = Rotation(nginx, LIMIT)
        async with Load(nginx, tmp_path, LONG, each=1) as load, tables_of(database) as tables:
            code, said = await upgrade_while_somebody_reads(database, newer)
            assert code == 5, said
            assert f"{head()} -> 0900" in said
            assert "step to 0901 waits" in said
            assert all(f"{node.name} (" in said for node in members)

            await rotation.restart(members[0])  # the older build starts anew on what was expanded
            for number, node in enumerate(members, 1):
                node.env.update(newer)
                await rotation.restart(node)
                code, said = await upgrade(database, newer, "--contract-later")
                assert code == 0, said
                assert [f"{each.name} (" in said for each in members] == [False] * number + [True] * (3 - number), said
            assert "0900 -> 0901" in said
            builds = await tables.rows("select schema_newest from pgmcp.nodes where state = 'ready'")
            assert [row["schema_newest"] for row in builds] == ["0901"] * 3

            with pytest.raises(AssertionError, match="ended with 4"):
                _late(database, tmp_path, env)
            await rotation.restart(members[0])  # and the newer one on what was contracted
            saw = await load.finish()
        figures = figures_of(saw, nginx)
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1))
        check(saw, figures, truth)


def _late(database: str, folder: Path, env: Mapping[str, str]) -> None:
    """A node of the older build comes too late."""
    [port] = free_ports(1)
    with NodeProcess(TARGET, database_url=database, name="late", port=port, log_dir=folder, env=env):
        pass
