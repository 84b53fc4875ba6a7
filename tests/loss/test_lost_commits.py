"""A standby is promoted that lacks the last commits: nothing is mixed up, nothing runs twice, every request ends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from pgmcp.session.host import Host
from pgmcp.store.timeline import Timeline
from pgmcp.types import JUMP
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import tables_of
from tests.harness.servers import Server
from tests.harness.waiting import eventually
from tests.loss.inside import Truth, two_nodes, waiting

UPDATED = "notifications/resources/updated"

pytestmark = pytest.mark.timeout(120)


def seq_of(exchange: RawExchange) -> int:
    """The number of the last event that was taken."""
    return int((exchange.last_event_id or "").rpartition(".")[2])


async def test_the_last_commits_are_lost(primary: Server, standby: Server) -> None:
    truth = Truth()
    async with two_nodes(primary.url(standby.port), truth) as nodes, AsyncExitStack() as stack:
        here, there = nodes
        names = ("told", "answered", "lost", "quiet", "late")
        opened = {name: await stack.enter_async_context(RawSession()) for name in names}
        for name in names[:-1]:
            await opened[name].open(here.url, there.url)
        before = [node.incarnation.node_id for node in nodes]
        ear = await opened["told"].get(there.url)
        await opened["told"].call_tool(there.url, "update", uri="test://1")
        assert (await ear.message(UPDATED))["params"]["uri"] == "test://1"
        calls = {
            name: await waiting(opened[name], there, truth, f"{name} early") for name in ("told", "answered", "quiet")
        }
        await standby.has_all_of(primary)
        await standby.detach()

        await opened["late"].open(here.url)
        calls["lost"] = await waiting(opened["lost"], there, truth, "lost early")
        truth.gates["answered early"].set()
        assert "result" in await calls["answered"].response("answered early")
        for number in (2, 3):
            await opened["told"].call_tool(here.url, "update", uri=f"test://{number}")
            assert (await ear.message(UPDATED))["params"]["uri"] == f"test://{number}"
        lost = ear.last_event_id

        await asyncio.to_thread(primary.kill)
        truth.gates["quiet early"].set()  # its answer is on its way when the term begins
        await asyncio.to_thread(standby.promote)
        for node in nodes:
            timeline, host = node.database.timeline, node.incarnation.host

            def went_on(timeline: Timeline = timeline, host: Host = host) -> bool:
                return timeline.term == 1 and not host.unsettled

            await eventually(went_on, "it goes on in the next term")

        # What ran and is complete goes on where it was.
        assert (await calls["quiet"].response("quiet early"))["result"]["content"][0]["text"] == "quiet early"
        assert seq_of(calls["quiet"]) > JUMP
        # What the database does not know, and what may have run in a session that is not complete, ends with an error.
        for name, reason in (("lost", "commits_lost"), ("told", "owner_lost")):
            error = (await calls[name].response(f"{name} early"))["error"]
            assert error["data"]["outcome"] == "unknown"
            assert error["data"]["reason"] == reason
        # Everybody goes on; what was opened in the last moments is gone, and its client hears so.
        for name in names[:-1]:
            for node in nodes:
                assert (await opened[name].call_tool(node.url, "run", text=f"{name} {node.url}"))["content"]
        assert (await opened["late"].request(there.url, "ping")).status == 404
        # Nobody waits behind a number that was given out: the stream goes on, and can be resumed from within the gap.
        await opened["told"].call_tool(there.url, "update", uri="test://4")
        assert (await ear.message(UPDATED))["params"]["uri"] == "test://4"
        assert seq_of(ear) > JUMP
        again = await opened["told"].get(here.url, lost)
        assert (await again.message(UPDATED))["params"]["uri"] == "test://4"

        assert max(truth.ran.values()) == 1, truth.ran
        assert [node.incarnation.node_id for node in nodes] == before
        async with tables_of(standby.url()) as tables:
            assert await tables.value("select count(*) from pgmcp.takeover_history") == 0
            assert await tables.value("select count(*) from pgmcp.requests where finished_at is null") == 0
            rows = await tables.rows("select epoch from pgmcp.sessions")
            assert {row["epoch"] for row in rows} == {JUMP + 1}
            assert await tables.value("select term from pgmcp.history") == 1


async def test_a_lost_request_ends_in_plain_json_too(primary: Server, standby: Server) -> None:
    truth = Truth()
    async with two_nodes(primary.url(standby.port), truth, response="json") as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        await standby.has_all_of(primary)
        await standby.detach()
        call = asyncio.create_task(waiting(session, nodes[1], truth, "lost"))
        await eventually(lambda: truth.ran["lost"], "it runs")
        await asyncio.to_thread(primary.kill)
        await asyncio.to_thread(standby.promote)
        answer = await call
        assert (answer.status, answer.json()["error"]["data"]["reason"]) == (200, "commits_lost")
        assert answer.json()["id"] == "lost"
        await session.call_tool(nodes[1].url, "run", 20, text="after")


async def test_a_server_of_the_former_history_is_refused(primary: Server, standby: Server) -> None:
    """The former primary comes back as it was: nobody works with it again."""
    truth = Truth()
    async with two_nodes(primary.url(standby.port), truth) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        await asyncio.to_thread(primary.kill)
        await asyncio.to_thread(standby.promote)
        await session.call_tool(nodes[1].url, "run", 20, text="after")
        await asyncio.to_thread(primary.start)
        for node in nodes:
            with pytest.raises(ConnectionError, match="timeline that is over"):
                await node.database.connect(primary.url(), timeout=5)
        async with tables_of(standby.url()) as tables:
            await tables.value(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity where pid <> pg_backend_pid()"
            )
        await session.call_tool(nodes[1].url, "run", 20, text="again")
        async with tables_of(primary.url()) as tables:
            there = "select count(*) from pg_stat_activity where application_name like 'pgmcp %'"

            async def nobody() -> bool:
                return bool(await tables.value(there) == 0)  # but who is just being refused

            await eventually(nobody, "nobody works there")
            assert await tables.value("select term from pgmcp.history") == 0


async def test_a_primary_that_takes_no_more_writes_is_left(primary: Server, standby: Server) -> None:
    """It was demoted, and lives on: line and pool go to its successor, and running calls end there."""
    truth = Truth()
    async with two_nodes(primary.url(standby.port), truth) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        running = await waiting(session, nodes[1], truth, "running")
        before = [node.incarnation.node_id for node in nodes]
        async with tables_of(primary.url()) as tables:
            await tables.execute("alter system set default_transaction_read_only = on")
            await tables.value("select pg_reload_conf()")
            held = asyncio.create_task(session.call_tool(nodes[1].url, "run", 20, text="held"))
            await standby.has_all_of(primary)
            await asyncio.to_thread(standby.promote)
            await held
            truth.gates["running"].set()
            assert "result" in await running.response("running")
            left = "select count(*) = 0 from pg_stat_activity where application_name like 'pgmcp %'"
            await eventually(lambda: tables.value(left), "nobody works with the former primary")
        assert [node.incarnation.node_id for node in nodes] == before
        assert truth.ran == {"running": 1, "held": 1}
