"""Deploys: nodes leave one after the other while clients work (G10)."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from pgmcp.cli import main
from tests.harness.clients import RawSession
from tests.harness.cluster import Tables, tables_of
from tests.harness.processes import NodeProcess, ServerProcess, free_ports, nodes, running
from tests.harness.waiting import eventually

TARGET = "tests/harness/deploys.py:mcp"


@pytest.fixture
async def three(database: str, tmp_path: Path) -> AsyncIterator[list[NodeProcess]]:
    (tmp_path / "truth").touch()
    env = {"TRUTH": str(tmp_path / "truth")}
    with nodes(TARGET, 3, database_url=database, log_dir=tmp_path, env=env) as started:
        yield started


def call(name: str, **arguments: object) -> dict[str, object]:
    return {"name": name, "arguments": arguments}


async def test_idle_sessions_move_at_once_and_busy_ones_when_they_are_done(
    three: list[NodeProcess], database: str
) -> None:
    async with tables_of(database) as tables, RawSession() as idle, RawSession() as busy:
        for session in (idle, busy):
            await session.open(three[0].url)
            await session.call_tool(three[1].url, "count")
        standalone = await idle.get(three[1].url)
        running = await busy.request(three[1].url, "tools/call", call("unsafe", text="x", seconds=2), request_id=50)
        here = await busy.request(three[0].url, "tools/call", call("unsafe", text="y", seconds=2), request_id=51)
        three[0].signal(signal.SIGTERM)
        moved = "select count(*) from pgmcp.takeovers where reason = 'drain'"

        async def one() -> bool:
            return bool(await tables.value(moved) == 1)

        await eventually(one, "the idle one moves")
        counted = (await idle.call_tool(three[2].url, "count"))["structuredContent"]
        assert counted == {"memory": 2, "kept": 2, "restored": True}
        assert "result" in await running.response(50)
        resumed = await busy.get(three[2].url, here.last_event_id) if here.error else here
        assert "result" in await resumed.response(51)
        assert three[0].wait(20) == 0
        counted = (await busy.call_tool(three[1].url, "count"))["structuredContent"]
        assert counted == {"memory": 2, "kept": 2, "restored": True}
        assert standalone.error is None
        rows = await tables.rows("select reason, epoch from pgmcp.takeovers")
        assert [tuple(row) for row in rows] == [("drain", 2)] * 2
        assert await tables.value("select count(*) from pgmcp.nodes where state = 'left'") == 1


# -- how long, and what goes on meanwhile ------------------------------------------------------------------------------


def truth(folder: Path) -> dict[str, str]:
    (folder / "truth").touch()
    return {"TRUTH": str(folder / "truth")}


async def handed(tables: Tables) -> int:
    """How many sessions were handed over."""
    return int(await tables.value("select count(*) from pgmcp.takeovers where reason = 'drain'"))


async def left(process: ServerProcess, seconds: float) -> float:
    """Wait for a process to end; how many seconds it took."""
    start = time.monotonic()
    await eventually(lambda: not process.running, "the node leaves", seconds)
    return time.monotonic() - start


async def status(node: ServerProcess) -> int:
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        return (await http.get(f"{node.url}/readyz")).status_code


async def test_during_the_notice_it_is_unready_and_serves_on(database: str, tmp_path: Path) -> None:
    env = truth(tmp_path) | {"PGMCP_DRAIN_NOTICE": "3"}
    with nodes(TARGET, 2, database_url=database, log_dir=tmp_path, env=env) as (leaving, other):
        async with RawSession() as session, RawSession() as late:
            await session.open(leaving.url)
            slow = await session.request(leaving.url, "tools/call", call("unsafe", text="x", seconds=1), request_id=50)
            leaving.signal(signal.SIGTERM)

            async def unready() -> bool:
                return await status(leaving) == 503

            await eventually(unready, "it is unready at once", 1.5)
            await late.open(leaving.url)
            exchange = await late.request(leaving.url, "tools/call", call("count"), request_id=60)
            assert exchange.headers["connection"] == "close", "a balancer must not keep connections to it"
            assert (await exchange.response(60))["result"]["structuredContent"]["kept"] == 1
            assert "result" in await slow.response(50)
            assert leaving.running
            await left(leaving, 10)
            assert leaving.returncode == 0
            for one, count in ((session, 1), (late, 2)):
                assert (await one.call_tool(other.url, "count"))["structuredContent"]["kept"] == count


async def test_a_node_without_peers_leaves_when_it_has_finished(database: str, tmp_path: Path) -> None:
    with nodes(TARGET, 1, database_url=database, log_dir=tmp_path, env=truth(tmp_path)) as (node,):
        async with RawSession() as idle, RawSession(protocol_version="2025-03-26") as busy:
            await idle.open(node.url)
            await busy.open(node.url)
            running = await busy.request(node.url, "tools/call", call("unsafe", text="x", seconds=2), request_id=50)
            node.signal(signal.SIGTERM)
            assert "result" in await running.response(50)
            assert await left(node, 10) < 5, "nobody is there to give idle sessions to, so nobody is waited for"
            assert node.returncode == 0


async def test_plain_json_is_waited_for_on_the_edge_that_leaves(database: str, tmp_path: Path) -> None:
    env = truth(tmp_path) | {"PGMCP_RESPONSE": "json"}
    with nodes(TARGET, 2, database_url=database, log_dir=tmp_path, env=env) as (owner, edge):
        async with RawSession() as session:
            await session.open(owner.url)
            calling = asyncio.create_task(session.call_tool(edge.url, "unsafe", 15, text="x", seconds=3))

            async def started() -> bool:
                return (tmp_path / "truth").read_text().count("start") == 1

            await eventually(started, "the call runs")
            edge.signal(signal.SIGTERM)
            assert (await calling)["content"][0]["text"] == "x"
            await left(edge, 10)
            assert edge.returncode == 0


async def test_what_lasts_longer_than_the_limit_is_treated_as_after_a_death(database: str, tmp_path: Path) -> None:
    env = truth(tmp_path) | {"PGMCP_DRAIN_LIMIT": "2"}
    with nodes(TARGET, 2, database_url=database, log_dir=tmp_path, env=env) as (owner, edge):
        async with RawSession() as session:
            await session.open(owner.url)
            lost = await session.request(edge.url, "tools/call", call("unsafe", text="x", seconds=60), request_id=50)
            held = await session.request(edge.url, "tools/call", call("safe", text="y", seconds=5), request_id=51)

            async def started() -> bool:
                return (tmp_path / "truth").read_text().count("start") == 2

            await eventually(started, "both run")
            owner.signal(signal.SIGTERM)
            await left(owner, 2 + 10)
            assert owner.returncode == 0
            error = (await lost.response(50))["error"]
            assert error["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
            assert (await held.response(51, 15))["result"]["content"][0]["text"] == "y"


async def test_a_session_that_always_works_on_something_starts_new_requests_on_its_next_owner(
    database: str, tmp_path: Path
) -> None:
    env = truth(tmp_path) | {"PGMCP_DRAIN_LIMIT": "6"}
    with nodes(TARGET, 2, database_url=database, log_dir=tmp_path, env=env) as (owner, edge):
        async with RawSession() as session, tables_of(database) as tables:
            await session.open(owner.url)

            async def work(number: int) -> None:
                end = time.monotonic() + 8
                for turn in range(99):
                    if time.monotonic() > end:
                        return
                    text = f"{number}-{turn}"
                    result = await session.call_tool(edge.url, "unsafe", 15, text=text, seconds=1.1 + 0.37 * number)
                    assert result["content"][0]["text"] == text

            working = [asyncio.create_task(work(number)) for number in range(5)]

            async def started() -> bool:
                return (tmp_path / "truth").read_text().count("start") >= 5

            await eventually(started, "all of them work")
            owner.signal(signal.SIGTERM)
            await left(owner, 6 + 10)
            assert owner.returncode == 0
            await asyncio.gather(*working)
            assert await handed(tables) == 1
    texts = [json.loads(line)[1] for line in (tmp_path / "truth").read_text().splitlines() if '"start"' in line]
    assert len(texts) == len(set(texts)), "something ran twice"


async def test_a_second_signal_ends_it_at_once(database: str, tmp_path: Path) -> None:
    with nodes(TARGET, 2, database_url=database, log_dir=tmp_path, env=truth(tmp_path)) as (leaving, other):
        async with RawSession() as session, tables_of(database) as tables:
            await session.open(leaving.url)
            running = await session.request(other.url, "tools/call", call("safe", text="x", seconds=4), request_id=50)
            stream = await session.get(leaving.url)
            leaving.signal(signal.SIGTERM)

            async def unready() -> bool:
                return await status(leaving) == 503

            await eventually(unready, "it drains")
            leaving.signal(signal.SIGTERM)
            assert await left(leaving, 10) < 4
            assert leaving.returncode == 0
            await stream.rest(5)
            assert stream.error is None, "its stream ends with the final chunk"
            assert "result" in await running.response(50, 15), "as after a death: it was safe, and ran again"
            assert await tables.value("select count(*) from pgmcp.nodes where state = 'left'") == 1


# -- by order ----------------------------------------------------------------------------------------------------------


def ordered(database: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["drain", *arguments], env={"PGMCP_DATABASE_URL": database})


def test_a_node_leaves_by_order(database: str, tmp_path: Path) -> None:
    ports = free_ports(4)
    names = ("one", "twin", "twin", "last")
    members = [
        NodeProcess(
            TARGET, database_url=database, name=name, port=port, log_dir=tmp_path / str(port), env=truth(tmp_path)
        )
        for name, port in zip(names, ports, strict=True)
    ]
    with running(members) as (one, twin, other, last):
        result = ordered(database, "one", "--json")
        assert result.exit_code == 0, result.output
        gone = json.loads(result.stdout)
        assert (gone["node_name"], gone["state"]) == ("one", "left")
        assert one.wait(10) == 0
        assert "has left" in ordered(database, gone["node_id"]).stdout, "a repeat finds that it is done"

        result = ordered(database, "one")
        assert (result.exit_code, "No living node is called one" in result.output) == (1, True)

        result = ordered(database, "twin")
        assert result.exit_code == 2
        listed = [line.split() for line in result.output.splitlines() if line.startswith("  ")]
        assert {(state, address) for _, state, address in listed} == {
            ("ready", f"127.0.0.1:{port}") for port in ports[1:3]
        }
        chosen = next(node for node, _, address in listed if address.endswith(str(ports[2])))
        assert ordered(database, chosen).exit_code == 0
        assert other.wait(10) == 0
        assert twin.running

        result = ordered(database, "last", "--no-wait")
        assert (result.exit_code, "drains" in result.stdout) == (0, True)
        assert last.wait(15) == 0


def test_orders_that_cannot_be_given(database: str, empty_database: str) -> None:
    assert ordered("postgresql://nobody@127.0.0.1:1/none", "x").exit_code == 3
    assert ordered(empty_database, "x").exit_code == 4
    assert ordered("", "x").exit_code == 2
    assert ordered(database).exit_code == 2
    assert ordered(database, "x").exit_code == 1


# -- under somebody else's server --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
async def test_under_a_foreign_server_sessions_are_handed_over_too(database: str, tmp_path: Path, workers: int) -> None:
    env = truth(tmp_path) | {"PGMCP_DATABASE_URL": database, "PGMCP_DRAIN_NOTICE": "0.5"}
    port = free_ports(1)[0]
    more = ["--workers", str(workers)] if workers > 1 else []
    foreign = ServerProcess(
        [sys.executable, "-m", "uvicorn", "tests.harness.foreign:app", "--port", str(port), *more],
        port=port,
        log_path=tmp_path / "foreign.log",
        env=env,
    )
    with nodes(TARGET, 1, database_url=database, log_dir=tmp_path, env=env) as (other,), foreign:
        async with tables_of(database) as tables, RawSession() as session, RawSession() as second:

            async def all_ready() -> bool:
                return bool(await tables.value("select count(*) from pgmcp.nodes where state = 'ready'") == 1 + workers)

            await eventually(all_ready, "every worker has joined", 30)
            for one in (session, second):
                await one.open(foreign.url)
            stream = await session.get(foreign.url)
            slow = await session.request(foreign.url, "tools/call", call("unsafe", text="x", seconds=2), request_id=50)
            foreign.signal(signal.SIGTERM)
            await left(foreign, 20)
            assert stream.error is None, "its stream ends with the final chunk"
            await slow.rest()
            assert slow.error is None
            if not slow.messages:
                slow = await session.get(other.url, slow.last_event_id)
                await slow.rest()
            assert "result" in slow.messages[-1]
            for one in (session, second):
                assert (await one.call_tool(other.url, "count"))["structuredContent"]["kept"] == 1
            assert await handed(tables) == 2
            assert await tables.value("select count(*) from pgmcp.nodes where state = 'left'") == workers
