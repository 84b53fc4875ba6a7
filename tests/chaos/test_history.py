"""Histories: whatever befalls the cluster, no number is told twice, forgotten or passed over, and no session is lost.

``HISTORY_SEEDS=100`` plays a hundred, ``HISTORY_SECONDS`` each; the figures of each go to .cache/history.jsonl. A seed
that failed is played again alone by its number: ``HISTORY_SEEDS=100 … "test_history.py::test_a_history[17]"``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgmcp.store.schema import migrations
from tests.chaos.bumps import Balancer, Client
from tests.chaos.judge import Call, judge
from tests.chaos.nemesis import Blow, Kind, Member, Nemesis, schedule
from tests.chaos.stage import Stage
from tests.harness.clients import RawSession
from tests.harness.cluster import tables_of
from tests.harness.processes import REPOSITORY
from tests.harness.proxy import proxied
from tests.harness.servers import Server, site

SEEDS = int(os.environ.get("HISTORY_SEEDS", "3"))
"""Together they have every kind of blow."""

SECONDS = float(os.environ.get("HISTORY_SECONDS", "30"))
NODES, SESSIONS, CLIENTS = 4, 6, 2
HOLD = "8"
"""Seconds after which clients are told to try again: less than some blows last, more than one statement may take."""

SETTLE = 40.0
"""Seconds after which every call has ended when nothing happens any more."""

FIGURES = REPOSITORY / ".cache/history.jsonl"
LAZY = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "wal_buffers": "16MB"}
"""A crash forgets every commit that nobody waited for."""

pytestmark = pytest.mark.timeout(SECONDS + SETTLE + 120)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that may crash, with the tables of pgmcp in a template."""
    with site() as place:
        made = Server.fresh(place, **LAZY)
        made.start()
        try:
            migrations.upgrade(made.url(), "pgmcp")
            yield made
        finally:
            made.stop()


@asynccontextmanager
async def new_database(server: Server, name: str, settings: Sequence[str]) -> AsyncIterator[str]:
    """A database of its own; its address."""
    at = urlsplit(server.url())
    admin = await asyncpg.connect(at._replace(path="/template1").geturl())
    try:
        await admin.execute(f"create database {name} template postgres strategy file_copy")
        for setting in settings:
            await admin.execute(f"alter role postgres in database {name} set {setting}")
        await admin.execute("checkpoint")
    finally:
        await admin.close()
    yield at._replace(path=f"/{name}").geturl()


@asynccontextmanager
async def cluster(database: str, folder: Path) -> AsyncIterator[tuple[Stage, list[Member]]]:
    """Nodes on a database, each with a way of its own to it."""
    async with tables_of(database) as tables:
        stage = Stage(database, tables, folder)
    async with AsyncExitStack() as ways:
        ends = [await ways.enter_async_context(proxied(database)) for _ in range(NODES)]
        try:
            members = [
                Member(stage.add(1, PGMCP_DATABASE_URL=address, PGMCP_HOLD=HOLD)[0], way) for way, address in ends
            ]
            await stage.ready()
            yield stage, members
        finally:
            await stage.close()


async def play(stage: Stage, nemesis: Nemesis, blows: Sequence[Blow], seed: int) -> list[Call]:
    """Let clients work while everything happens; when it is over each of them calls once more."""
    clients, balancer = list[Client](), Balancer(stage.living)
    for number in range(SESSIONS):
        async with RawSession() as opener:
            await opener.open(stage.nodes[number % NODES].url, stage.nodes[-1].url)
            for each in "ab"[:CLIENTS]:
                name = f"{number}{each}"
                clients.append(Client(name, str(opener.session_id), balancer, f"{seed} {name}"))
    over = asyncio.Event()
    work = [asyncio.create_task(client.run(over)) for client in clients]
    try:
        await nemesis.run(blows)
        over.set()
        await stage.ready()
        for _ in range(2):
            _, hanging = await asyncio.wait(work, timeout=SETTLE)
            if hanging:
                break
            work = [asyncio.create_task(client.bump()) for client in clients]
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        for client in clients:
            await client.close()
    return [call for client in clients for call in client.history]


def note(seed: int, blows: Sequence[Blow], history: Sequence[Call], wrong: Sequence[str]) -> None:
    """Add a line to the figures."""
    FIGURES.parent.mkdir(exist_ok=True)
    figures = {
        "seed": seed,
        "calls": len(history),
        "unknown": sum(call.told is None and not call.fault for call in history),
        "again": sum(call.tries > 1 for call in history),
        "longest": round(max(call.ended - call.began for call in history), 2),
        "blows": Counter(blow.kind.name.lower() for blow in blows),
        "wrong": wrong[:5],
    }
    with FIGURES.open("a") as file:
        file.write(json.dumps(figures) + "\n")


async def one(server: Server, folder: Path, seed: int, seconds: float, *settings: str) -> None:
    """Play a history, and judge it."""
    blows = schedule(seed, seconds, NODES)
    print(f"seed {seed}:", *blows, sep="\n")
    async with (
        new_database(server, f"history_{seed}", settings) as database,
        cluster(database, folder) as (stage, members),
    ):
        history = await play(stage, Nemesis(stage, members, server), blows, seed)
        wrong = judge(history)
        note(seed, blows, history, wrong)
        print(*(call for call in history if call.session in "".join(wrong)), sep="\n")
        assert not wrong, "\n".join(wrong)
        async with tables_of(database) as tables:
            stage.tables = tables
            await stage.check()


def test_the_two_that_are_always_played_have_every_kind_of_blow() -> None:
    met = {blow.kind for seed in (1, 2) for blow in schedule(seed, 30, NODES)}
    assert met == set(Kind)


@pytest.mark.parametrize("seed", range(1, SEEDS + 1))
async def test_a_history(server: Server, tmp_path: Path, seed: int) -> None:
    await one(server, tmp_path, seed, SECONDS)


async def test_a_history_where_nobody_is_to_wait_for_the_disk(server: Server, tmp_path: Path) -> None:
    """Role or database say so; what clients are told is on it all the same."""
    await one(server, tmp_path, 0, 10.0, "synchronous_commit = off")
