"""What README and quickstart tell to type works, and the code in the other documents runs.

What is replaced, and nothing else: ports 8000 to 8003 by free ones, the database's address by one of the test's own,
the public address by loopback, and ``pip install`` (of this checkout) by what the fixture ``commands`` has done.
One node of ``make up`` is enough. ``make test`` is aside: it is what runs this. So is ``make demo``, whose command
tests/cli/test_demo.py runs.
"""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shlex
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer

import pgmcp
from pgmcp.embedded import binaries
from pgmcp.session.target import load
from pgmcp.store.schema.revisions import head
from pgmcp.web.hosts import listed
from tests.harness.clients import RawSession, connect
from tests.harness.cluster import cluster, tables_of
from tests.harness.compose import of
from tests.harness.documents import Reader, blocks, file_of
from tests.harness.modern import Modern
from tests.harness.processes import PLAIN, REPOSITORY, free_ports
from tests.harness.shipped import Shipped

README, DOCS = REPOSITORY / "README.md", REPOSITORY / "docs"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
DOCUMENTS = sorted([README, CONTRIBUTING, REPOSITORY / "CHANGELOG.md", REPOSITORY / "SECURITY.md", *DOCS.rglob("*.md")])
LANGUAGES = {"", "python", "sh", "sql", "yaml", "ini"}


def free_range(count: int) -> int:
    """The first of so many free ports in a row, looked for elsewhere by each process that may look at the same time."""
    begin = os.getpid() * 50 % 40_000
    for offset in range(0, 40_000, 50):
        first = 18_000 + (begin + offset) % 40_000
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        else:
            return first
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def replacements(database: str) -> dict[str, str]:
    port = free_range(4)
    return {
        **{f"{8000 + number}": f"{port + number}" for number in range(4)},
        "postgresql://user:password@db/app": database,
        "postgresql://user:password@localhost/app": database,
        "--host 0.0.0.0": "--host 127.0.0.1",
        "make up": f'make up ARGS="--port {port} --nodes 1"',
        "pgmcp up notes.py:mcp": f"pgmcp up notes.py:mcp --port {port}",
        "pip install .": "pgmcp --version",
        "pip install '.[embedded]'": "pgmcp --version",
        "make test": "true",
        "make demo": "true",
    }


@pytest.fixture
def reader(empty_database: str, commands: Path, tmp_path: Path) -> Reader:
    return Reader(tmp_path, commands, replacements(empty_database))


async def test_the_readme_works(reader: Reader, empty_database: str) -> None:
    with reader:
        for block in blocks(README):
            if block.language == "python":
                reader.save(block)
            elif block.language == "sql":
                connection = await asyncpg.connect(empty_database)
                await connection.fetch(block.text)
                await connection.close()
            elif block.language == "sh":
                reader.follow(block)
                if "uvicorn" in block.text:
                    async with connect(f"http://127.0.0.1:{reader.here('8000')}/mcp") as client:
                        result = await client.call_tool("add", {"a": 1, "b": 2})
                        assert result.structured_content == {"result": 3}


async def test_a_fastapi_application_gets_to_two_replicas_behind_nginx(
    empty_database: str, commands: Path, tmp_path: Path
) -> None:
    """Beside its own tables and its own Alembic, as a role that may change no table."""
    at, ports = urlsplit(empty_database), free_ports(2)
    owner, nodes = (f"{at.path[1:]}_{purpose}" for purpose in ("owner", "nodes"))
    shipped = "nginx/round-robin.conf"
    replaced = {
        "postgresql://admin:password@db/app": empty_database,
        "@db/app": f"@{at.hostname}:{at.port}{at.path}",
        "shop_owner": owner,
        "shop_nodes": nodes,
        "8001": f"{ports[0]}",
        "8002": f"{ports[1]}",
        "HOSTS=mcp.example.com:8080": "HOSTS=127.0.0.1:*",
        "pip install": "true",
        f"docker/{shipped}": f"{of(shipped)}",
        "nginx -p . -c nginx.conf": "true",
    }
    async with tables_of(empty_database) as tables:
        try:
            with Reader(tmp_path, commands, replaced) as reader:
                reader.env["PATH"] += f":{binaries.find()}"  # psql
                for block in blocks(DOCS / "fastapi.md"):
                    if file_of(block):
                        reader.save(block)
                    elif block.language == "sql":
                        await tables.execute(reader.here(block.text))
                    else:
                        reader.follow(block)
                        if "pgmcp nodes" in block.text:
                            assert {"shop-1", "shop-2"} <= set(reader.output.split())
                text = (tmp_path / "nginx.conf").read_text()
                with Shipped(shipped, {}, tmp_path / "nginx", text) as nginx:
                    async with connect(nginx.mcp_url) as client:
                        for cents in range(4):
                            await client.call_tool("set_price", {"name": "tea", "cents": cents})
                    async with httpx.AsyncClient(trust_env=False, verify=PLAIN) as http:
                        assert (await http.get(f"{nginx.url}/prices")).json() == {"tea": 3}
                    posted = {each.ports for each in nginx.exchanges if each.method == "POST"}
                    assert posted == {(port,) for port in ports}
            assert await tables.value("select version_num from public.alembic_version") == "0001"
            assert await tables.value("select version_num from shop_mcp.alembic_version") == head()
            assert not await tables.value("select count(*) from pg_class where relowner = $1::regrole", nodes)
        finally:
            for role in (nodes, owner):
                await tables.execute(f"drop owned by {role} cascade; drop role {role}")


def test_the_fastapi_page_lists_the_name_that_its_clients_say() -> None:
    """The test above puts another name in its place."""
    page = (DOCS / "fastapi.md").read_text()
    [hosts] = re.findall(r"^export PGMCP_ALLOWED_HOSTS=(\S+)$", page, re.MULTILINE)
    [host] = re.findall(r"`http://([^/`]+)/mcp` is for MCP clients", page)
    assert listed(host, hosts.split(","))


async def test_the_quickstart_works(reader: Reader) -> None:
    with reader:
        for block in blocks(DOCS / "quickstart.md"):
            if block.language == "python":
                reader.save(block)
            elif block.language == "sh":
                if "export" in block.text:
                    reader.end(int(reader.here("8000")))
                reader.follow(block)
            else:
                assert block.text == reader.output, "it shows what the client prints"
        assert {"node-1", "node-2"} <= set(reader.output.split())


def test_make_up_and_make_demo_are_the_commands() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for name in ("up", "demo"):
        assert re.search(rf"^{name}: .*\n\t@\$\(BIN\)/pgmcp {name} \$\(ARGS\)$", makefile, re.MULTILINE)


ROOMS = ("", "pgmcp", "tests/cluster", "tests/store")
"""Folders from which the recipes name files."""


def test_the_recipes_name_what_is_there() -> None:
    text = CONTRIBUTING.read_text()
    paths = [
        path
        for path in re.findall(r"`((?:[\w.]+/)*[\w*.]+\.(?:py|md|sql|toml))`", text)
        if not re.search("NAME|NNNN", path)
    ]
    assert len(paths) > 50
    assert [path for path in paths if not any([*(REPOSITORY / room).glob(path)] for room in ROOMS)] == []
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(?:\w+=\S+ )?make (\w+)", text)) <= set(targets)


# -- the example in docs/guarantees.md -------------------------------------------------------------------------------


async def test_the_cart_survives_a_death_and_a_hand_over(database: str, tmp_path: Path) -> None:
    [block] = [block for block in blocks(DOCS / "guarantees.md") if block.language == "python"]
    name = file_of(block)
    assert name is not None
    (tmp_path / name).write_text(block.text)

    def served() -> object:
        return load(f"{tmp_path / name}:mcp")

    async with cluster(database, served, 3, drain_notice=0) as nodes, RawSession() as session:

        async def add(item: str, at: int) -> dict[str, object]:
            result = await session.call_tool(nodes[at].url, "add_to_cart", item=item)
            return dict(result["structuredContent"])

        await session.open(nodes[0].url)
        assert await add("milk", 1) == {"cart": ["milk"], "looked": 1}
        assert await add("tea", 2) == {"cart": ["milk", "tea"], "looked": 2}
        await nodes[0].node.drain()
        assert await add("bread", 1) == {"cart": ["milk", "tea", "bread"], "looked": 3}
        async with tables_of(database) as tables:
            owner = await tables.value("select owner from pgmcp.sessions")
            await tables.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", owner)
            [left] = [n for n, node in enumerate(nodes) if n and node.incarnation.node_id != owner]
            assert await add("jam", left) == {"cart": ["milk", "tea", "bread", "jam"], "looked": 1}


# -- the examples in docs/subscriptions.md ----------------------------------------------------------------------------


async def test_every_way_to_publish_reaches_a_stream(database: str, tmp_path: Path) -> None:
    [sql] = [block for block in blocks(DOCS / "subscriptions.md") if block.language == "sql"]
    for block in blocks(DOCS / "subscriptions.md"):
        if (name := file_of(block)) is not None:
            (tmp_path / name).write_text(block.text)

    def served() -> object:
        return load(f"{tmp_path / 'prices.py'}:mcp")

    async with cluster(database, served, 2) as nodes, RawSession() as session, Modern() as client:
        uri = "prices://today"
        wanted = {"resourceSubscriptions": [uri], "toolsListChanged": True, "promptsListChanged": True}
        stream = await client.request(nodes[0].url, "subscriptions/listen", {"notifications": wanted})
        await stream.message("notifications/subscriptions/acknowledged")
        await session.open(nodes[1].url)
        standalone = await session.get(nodes[0].url)
        assert await session.call_tool(nodes[1].url, "change", name="tea", price=4)
        await stream.message("notifications/resources/updated")
        script = await asyncio.create_subprocess_exec(
            sys.executable, tmp_path / "import_prices.py", env={**os.environ, "PGMCP_DATABASE_URL": database}
        )
        assert await asyncio.wait_for(script.wait(), 30) == 0
        await stream.message("notifications/resources/updated")
        async with tables_of(database) as tables:
            await tables.execute(sql.text)
        for exchange in (stream, standalone):
            for method in ("notifications/tools/list_changed", "notifications/prompts/list_changed"):
                await exchange.message(method)


async def test_the_bus_is_used_outside_of_handlers(database: str, tmp_path: Path) -> None:
    [block] = [block for block in blocks(DOCS / "subscriptions.md") if file_of(block) == "clock.py"]
    (tmp_path / "clock.py").write_text(block.text)
    clock = load(f"{tmp_path / 'clock.py'}:mcp")
    module: Any = sys.modules.pop("clock")
    servers = iter([clock, MCPServer("other")])
    async with cluster(database, lambda: next(servers), 2, cluster="both") as nodes, Modern() as client:
        wanted = {"notifications": {"toolsListChanged": True}}
        stream = await client.request(nodes[1].url, "subscriptions/listen", wanted)
        await stream.message("notifications/subscriptions/acknowledged")
        await module.something_happened()
        await stream.message("notifications/tools/list_changed")


# -- the example in docs/operations.md --------------------------------------------------------------------------------


class Nobody(TokenVerifier):
    async def verify_token(self, token: str) -> AccessToken | None:
        """Know nobody."""
        return None


async def test_mounted_as_documented_the_oauth_metadata_is_at_the_root() -> None:
    [example] = [block for block in blocks(DOCS / "operations.md") if "FastAPI(" in block.text]
    issuer, resource = "https://issuer.example", "https://mcp.example/mcp"
    auth = AuthSettings.model_validate(
        {"issuer_url": issuer, "resource_server_url": resource, "validate_token_resource": False}
    )
    names: dict[str, Any] = {"pgmcp": pgmcp, "FastAPI": FastAPI, "url": "postgresql://nobody@127.0.0.1:1/none"}
    names["server"] = MCPServer("private", token_verifier=Nobody(), auth=auth)
    exec(example.text, names)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://test") as http:
        metadata = await http.get("/.well-known/oauth-protected-resource/mcp")
        assert metadata.json()["resource"] == resource
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/docs")).status_code == 200, "the application's own"


# -- every document --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_are_what_they_say_and_links_lead_somewhere(path: Path) -> None:
    for block in blocks(path):
        assert block.language in LANGUAGES
        if block.language == "python":
            compile(block.text, path.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                shlex.split(line, comments=True)
    assert not re.search(r"pip install [^`\n]*\bpgmcp\b(?!/)", path.read_text()), "no index has it yet: this checkout"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^):]*)#([^)]+)\)", path.read_text()):
        text = (path.parent / target).read_text() if target else path.read_text()
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        headings = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in headings, f"{target}#{anchor}"
