"""PostgreSQL crashes, and comes back at once or later, under load: no session, no call and no notification is lost.

``LOSS_OUTAGE=60`` makes the long outage that long, and the hold what it is by default, for the figures of
docs/guarantees.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from pgmcp.clock import Clock, Ids
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from pgmcp.store.line import Line
from pgmcp.types import JUMP, NodeId
from tests.harness.clients import RawSession
from tests.harness.cluster import tables_of
from tests.harness.servers import Server
from tests.harness.waiting import eventually
from tests.loss.conftest import Cluster
from tests.loss.inside import Truth, two_nodes, waiting
from tests.loss.load import load, note, rounded, unmoved

OUTAGE = float(os.environ.get("LOSS_OUTAGE", "9"))
HOLD = 25.0 if OUTAGE > 25 else OUTAGE - 3
SHORT = {"deadline": 1.2, "trust": 4.5, "ttl": 6.0}
TRIES = 5
"""Crashes until one comes in time: each node's renewals bring claims to the disk, each second."""

pytestmark = pytest.mark.timeout(240 + 2 * OUTAGE)


async def test_postgres_crashes_under_load(primary: Server, cluster: Cluster, truth: Path) -> None:
    """It is back at once, within the hold, and after the hold: then clients hear that they should come again."""
    with cluster(primary.url(), hold=HOLD) as (_, nginx):
        async with load([nginx.mcp_url], truth, each=3) as work:
            for outage in (0.0, HOLD / 4, OUTAGE):
                assert not work.failures
                await work.all_served_since(time.monotonic())
                primary.crash()
                await asyncio.sleep(outage)
                primary.start(wait=False)
                await eventually(lambda: primary.state == "ready", "PostgreSQL is back", 20)
                back = time.monotonic()
                await work.all_served_since(back, 60)
                note(f"crash, {outage:g} s away", {"served after": rounded(work.served_after(back))})
                await unmoved(primary.url(), 3)
        work.check()
    note("crashes", {"calls": len(work.calls), "bad": work.failures})
    assert all("try again" in failure for failure in work.failures), work.failures


async def back(primary: Server) -> None:
    """Start PostgreSQL again."""
    primary.start(wait=False)
    await eventually(lambda: primary.state == "ready", "PostgreSQL is back", 20)


async def test_a_crash_takes_nothing_back_though_the_role_commits_asynchronously(primary: Server) -> None:
    primary.settings |= {"synchronous_commit": "off", "wal_writer_delay": "10s"}
    primary.stop()
    await back(primary)
    truth = Truth()
    async with two_nodes(primary.url(), truth) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        for turn in range(5):
            await session.call_tool(nodes[1].url, "run", text=f"turn {turn}")
            primary.kill()
            await back(primary)
            await session.call_tool(nodes[turn % 2].url, "run", 20, text=f"after {turn}")
        assert max(truth.ran.values()) == 1
        assert {node.database.timeline.term for node in nodes} == {0}


def starts(truth: Path, text: str) -> int:
    """How often a call has begun to run."""
    return truth.read_text().count(f'["start", "{text}"')


def copied(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", source, target], check=True)


async def test_a_storage_that_was_put_back_begins_a_term(primary: Server) -> None:
    """The same server, the same timeline, some seconds younger than its nodes."""
    truth, snapshot = Truth(), primary.data.with_name("snapshot")
    async with two_nodes(primary.url(), truth) as nodes, RawSession() as session, RawSession() as late:
        await session.open(nodes[0].url)
        ear = await session.get(nodes[1].url)
        primary.kill()
        await asyncio.to_thread(copied, primary.data, snapshot)
        await back(primary)
        for number in range(3):
            await session.call_tool(nodes[1].url, "update", 20, uri=f"test://{number}")
            await ear.message("notifications/resources/updated")
        await late.open(nodes[1].url)
        seen = int((ear.last_event_id or "").rpartition(".")[2])
        primary.kill()
        shutil.rmtree(primary.data)
        await asyncio.to_thread(copied, snapshot, primary.data)
        await back(primary)
        await session.call_tool(nodes[1].url, "update", 20, uri="test://after")
        assert (await ear.message("notifications/resources/updated"))["params"]["uri"] == "test://after"
        assert int((ear.last_event_id or "").rpartition(".")[2]) > JUMP > seen
        assert (await late.request(nodes[0].url, "ping")).status == 404
        assert {node.database.timeline.term for node in nodes} == {1}


async def claim_was_lost(primary: Server, text: str) -> bool:
    """Start PostgreSQL again; whether it has forgotten the claim of a request."""
    primary.start(wait=False)
    await eventually(lambda: primary.state == "ready", "PostgreSQL is back", 20)
    async with tables_of(primary.url()) as tables:
        question = "select claimed_epoch is null from pgmcp.requests where rpc_id = $1 and finished_at is null"
        return bool(await tables.value(question, json.dumps(text)))


async def test_a_claim_that_a_crash_forgets_is_known_to_its_owner(primary: Server) -> None:
    truth = Truth()
    async with two_nodes(primary.url(), truth) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        for turn in range(TRIES):
            call = await waiting(session, nodes[1], truth, f"turn {turn}")
            primary.crash()
            lost = await claim_was_lost(primary, f"turn {turn}")
            await session.call_tool(nodes[1].url, "run", 20, text=f"after {turn}")  # claims what waits before it, too
            truth.gates[f"turn {turn}"].set()
            assert "result" in await call.response(f"turn {turn}")
            assert max(truth.ran.values()) == 1
            if lost:
                return
        raise AssertionError("no claim was lost")


async def test_a_request_that_gets_the_id_of_a_forgotten_transaction_is_answered(primary: Server) -> None:
    """A crash forgets claims; the ids of their transactions are given out anew, where nobody would look again."""
    truth = Truth()
    async with two_nodes(primary.url(), truth) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        host, inbox = nodes[0].incarnation.host, nodes[0].incarnation.inbox
        [ownership] = await inbox.owned()
        for turn in range(TRIES):
            for _ in range(100):
                assert await inbox.claim(ownership) == []
            async with tables_of(primary.url()) as tables:
                given_out = await tables.value("select pg_snapshot_xmin(pg_current_snapshot())::text::bigint") - 20
            await inbox.unclaimed()
            host.unsettled = True  # no poll comes between the crash and the request
            primary.crash()
            primary.start(wait=False)
            await eventually(lambda: primary.state == "ready", "PostgreSQL is back", 20)
            await eventually(lambda: all(node.incarnation.line.up for node in nodes), "the lines are open again")
            async with tables_of(primary.url()) as tables:
                below = await tables.value("select pg_current_xact_id()::text::bigint")
                call = asyncio.create_task(session.call_tool(nodes[1].url, "run", text=f"after {turn}"))
                stored = f"select exists (select from pgmcp.requests where xact > {below} and rpc_id is not null)"
                await eventually(partial(tables.value, stored), "the request is stored")
            host.unsettled = False
            await call
            if below < given_out:
                return
        raise AssertionError("no transaction's id was given out anew")


async def test_what_a_dead_owner_may_have_claimed_is_not_run_again(
    primary: Server, cluster: Cluster, truth: Path
) -> None:
    """PostgreSQL crashes with it, and comes back without the claim."""
    with cluster(primary.url(), **SHORT) as (nodes, _):
        for turn in range(TRIES):
            async with RawSession() as session:
                await session.open(nodes[0].url)
                text = f"turn {turn}"
                params = {"name": "unsafe_long", "arguments": {"text": text, "seconds": 1.0}}
                call = await session.request(nodes[1].url, "tools/call", params, request_id=text)

                await eventually(partial(starts, truth, text), "it runs")
                primary.crash()
                nodes[0].kill()
                lost = await claim_was_lost(primary, text)
                answer = await call.response(text, 40)
                assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
                assert starts(truth, text) == 1
                if lost:
                    return
                nodes[0].start().wait_ready()
        raise AssertionError("no claim was lost")


async def test_a_line_tells_a_crash_from_an_orderly_restart(primary: Server) -> None:
    """A crash gives the ids of transactions out anew: what names them, a reader's horizon, is worth nothing then."""
    said: list[bool] = []
    settings = Settings(database_url=primary.url())
    database = Database(settings, Clock())
    line = Line(
        settings,
        NodeId(Ids().uuid()),
        Clock(),
        Ids(),
        on_payload=lambda _: None,
        on_broadcast=lambda _: None,
        on_reset=lambda *, crashed: said.append(crashed),
        on_lost=lambda: None,
        database=database,
    )
    await line.start()
    running = asyncio.create_task(line.run())
    try:
        for end in (primary.stop, primary.crash, primary.stop):
            count = len(said)
            await asyncio.to_thread(end)
            primary.start(wait=False)

            def said_more(count: int = count) -> bool:
                return len(said) > count

            await eventually(said_more, "the line is open again", 20)
        assert said[1:] == [False, True, False]
    finally:
        running.cancel()
        await asyncio.wait({running})
        await line.stop()
