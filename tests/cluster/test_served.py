"""One cluster serves one server: whoever serves another one does not join, and `up` and `demo` keep to themselves."""

from __future__ import annotations

import asyncio
import re
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fastmcp import FastMCP
from mcp.server import Server
from mcp.server.mcpserver import MCPServer

from pgmcp.cli import EXIT_CODES, main
from pgmcp.cli.local_setup import local_cluster, of_its_own
from pgmcp.cli.options import load
from pgmcp.cli.workers import HOPELESS
from pgmcp.clock import Clock
from pgmcp.embedded import EmbeddedPostgres
from pgmcp.errors import OtherServer, SettingsError
from pgmcp.node import Node
from pgmcp.session.target import target_of
from pgmcp.settings import Settings
from pgmcp.store.commands import identity
from pgmcp.store.schema import migrations, revisions
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, running_node, tables_of
from tests.harness.waiting import eventually


def counting(name: str, tool: str = "count") -> MCPServer:
    server = MCPServer(name)
    server.add_tool(lambda: 1, name=tool, description="Count.")
    return server


def running(database: str, server: object, name: str = "n", **settings: Any) -> AbstractAsyncContextManager[None]:
    """A node without HTTP, for as long as the context lasts."""
    return Node(Settings(database_url=database, node_name=name, **settings), server).running()


async def refusal(database: str, server: object) -> str:
    """Why a node does not join, in its own words."""
    node = Node(Settings(database_url=database), server)
    with pytest.raises(OtherServer):
        async with node.running():
            pass
    assert isinstance(node.failure, OtherServer)
    return str(node.failure)


@pytest.fixture
async def tables(database: str) -> Any:
    async with tables_of(database) as tables:
        yield tables


async def test_a_node_that_serves_another_server_does_not_join(database: str, tables: Tables) -> None:
    async with running_node(database, counting("one"), "n1", Clock()) as node, RawSession() as session:
        await session.open(node.url)
        said = await refusal(database, counting("other"))
        assert re.search("serves 'one', this node 'other'.*--schema.*--cluster 'one'.*db cluster", said)
        assert await tables.value("select array_agg(name) from pgmcp.nodes") == ["n1"]
        # another version, and other tools: an upgrade
        async with running_node(database, counting("one", "more"), "n3", Clock()) as upgraded:
            await session.request(upgraded.url, "ping")
        # another name that says that it is the same
        async with running_node(database, counting("renamed"), "n4", Clock(), cluster="one") as renamed:
            await session.request(renamed.url, "ping")


async def test_of_two_first_nodes_one_is_refused(database: str, tables: Tables) -> None:
    settled, found = asyncio.Event(), list[str]()

    async def run(number: int) -> None:
        name = f"s{number % 2}"
        try:
            async with running(database, counting(name)):
                found.append(name)
                await settled.wait()
        except OtherServer:
            found.append("refused")

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(run(number))
        await eventually(lambda: len(found) == 6, "all have joined or not")
        serves = await tables.value("select serves from pgmcp.cluster")
        assert sorted(found) == sorted([serves] * 3 + ["refused"] * 3)
        assert await tables.value("select count(*) from pgmcp.nodes where state = 'ready'") == 3
        settled.set()


async def test_an_operator_changes_the_name_when_nobody_is_there(database: str, tables: Tables) -> None:
    def command(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["db", "cluster", *arguments, "--database-url", database])
        return result.exit_code, result.output

    assert await asyncio.to_thread(command) == (0, "nothing yet: the first node says it\n")
    async with running(database, counting("one"), "n1"):
        code, output = await asyncio.to_thread(command, "other")
        assert (code, "living nodes: n1" in output) == (5, True)
    # a node that was killed: its lease has run out, nobody has declared it dead
    await tables.execute("update pgmcp.nodes set state = 'ready', expires_at = clock_timestamp() - interval '1 s'")
    assert await asyncio.to_thread(command, "other") == (0, "other\n")
    assert await tables.value("select array_agg(state) from pgmcp.nodes") == ["dead"]
    async with running(database, counting("other")):
        pass
    await refusal(database, counting("one"))


def test_every_node_finds_the_same_name() -> None:
    unnamed: list[FastMCP[Any]] = [FastMCP(), FastMCP()]
    assert unnamed[0].name != unnamed[1].name
    names = [target_of(each, "/mcp").name for each in (*unnamed, FastMCP("a"), MCPServer("b"), Server("c"))]
    assert names == ["FastMCP", "FastMCP", "a", "b", "c"]


def test_it_has_an_exit_code_of_its_own_and_no_worker_is_started_again() -> None:
    assert next(code for kind, code in EXIT_CODES if issubclass(OtherServer, kind)) == 6
    assert 6 in HOPELESS


# -- up and demo -----------------------------------------------------------------------------------------------------


def run_local(given: dict[str, Any], *, passing: bool = False) -> None:
    with local_cluster({"port": 0} | given, "examples/demo.py:mcp", 1, print, passing=passing):
        pass


def test_up_starts_nothing_in_a_schema_that_it_has_not_made(database: str, empty_database: str) -> None:
    result = CliRunner().invoke(main, ["up", "--port", "0"], env={"PGMCP_DATABASE_URL": database})
    assert result.exit_code == 2
    assert "was not made by `pgmcp up`" in result.output
    for _ in range(2):
        run_local({"database_url": empty_database})  # the second time it is its own
    migrations.upgrade(empty_database, "older", "0009")
    with pytest.raises(SettingsError, match="was not made by"):
        run_local({"database_url": empty_database, "schema_name": "older"})
    assert migrations.current(empty_database, "older") == "0009", "nothing was touched"


def test_up_goes_on_with_the_data_of_an_older_build(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "data") as server:
        migrations.upgrade(server.url, "pgmcp", "0009")
    with local_cluster({"port": 0}, "examples/demo.py:mcp", 1, print, tmp_path / "data") as (_, url):
        assert migrations.current(url, "pgmcp") == revisions.head()


def test_the_demo_knows_no_variables_and_leaves_nothing(
    database: str, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "LISTEN_URL"):
        monkeypatch.setenv(f"PGMCP_{name}", database)
    monkeypatch.setenv("PGMCP_SCHEMA", "live")
    settings = load(of_its_own({}))
    assert (settings.database_url, settings.listen_url, settings.schema_name) == ("", "", "pgmcp")
    made = of_its_own({"database_url": empty_database})
    assert made["schema_name"].startswith("pgmcp_demo_")
    with local_cluster({"port": 0} | made, "examples/demo.py:mcp", 1, print, passing=True) as (cluster, url):
        assert url == empty_database
        assert cluster.env["PGMCP_LISTEN_URL"] == ""
        assert identity.exists(url, made["schema_name"])
    assert not identity.exists(empty_database, made["schema_name"])
    with pytest.raises(SettingsError, match="choose another --schema"):
        run_local(of_its_own({"database_url": database, "schema_name": "pgmcp"}), passing=True)
    assert migrations.current(database, "pgmcp") == revisions.head()
