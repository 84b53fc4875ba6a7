"""``Publications``: stored once, read once by everybody, and what a new owner learns of them."""

from __future__ import annotations

import asyncio

import pytest

from pgmcp.errors import PublicationRefused
from pgmcp.store.publications import MOST
from pgmcp.types import LISTS, Change, Horizon, Ownership, Publication
from tests.harness.proxy import Cut
from tests.harness.stores import opened
from tests.ports.benches import Bench, Pair, Ports

TOOLS = Publication(Change.TOOLS)


def updated(uri: object) -> Publication:
    return Publication(Change.UPDATED, str(uri))


class Reader:
    """Reads along the horizons."""

    def __init__(self, node: Ports) -> None:
        self.node = node
        self.horizon: Horizon | None = None

    async def read(self) -> list[Publication]:
        batch = await self.node.publications.read(self.horizon)
        self.horizon = batch.horizon
        assert not batch.more
        return list(batch.publications)


@pytest.fixture
async def readers(pair: Pair) -> list[Reader]:
    found = [Reader(pair.one), Reader(pair.two)]
    for reader in found:
        assert await reader.read() == []
    return found


async def test_everybody_reads_each_once_in_order(pair: Pair, readers: list[Reader]) -> None:
    said = [updated(1), TOOLS, updated(2), updated(1), Publication(Change.PROMPTS), Publication(Change.RESOURCES)]
    for number, publication in enumerate(said):
        await (pair.one, pair.two)[number % 2].publications.publish(publication)
    for reader in readers:
        assert await reader.read() == said
        assert await reader.read() == []
    assert await Reader(pair.one).read() == said


async def test_readers_that_look_all_the_time_miss_nothing(pair: Pair, readers: list[Reader]) -> None:
    found: list[list[Publication]] = [[], []]
    done = asyncio.Event()

    async def look(reader: Reader, into: list[Publication]) -> None:
        while not done.is_set():
            into += await reader.read()
        into += await reader.read()

    looking = [asyncio.create_task(look(*each)) for each in zip(readers, found, strict=True)]
    said = [(node, f"{name} {n}") for name, node in (("one", pair.one), ("two", pair.two)) for n in range(200)]
    await asyncio.gather(*(node.publications.publish(updated(uri)) for node, uri in said))
    done.set()
    await asyncio.gather(*looking)
    for each in found:
        assert len(each) == len(set(each)) == 400


@pytest.mark.parametrize("where", [Cut.BEFORE, Cut.AFTER])
async def test_a_lost_reply_publishes_once(pair: Pair, readers: list[Reader], where: Cut) -> None:
    pair.bench.cut(pair.one, "publish", where)
    await pair.one.publications.publish(TOOLS)
    assert await readers[1].read() == [TOOLS]


async def test_too_many_are_not_listed(pair: Pair, readers: list[Reader]) -> None:
    await asyncio.gather(*(pair.one.publications.publish(updated(n)) for n in range(MOST + 1)))
    batch = await pair.two.publications.read(readers[1].horizon)
    assert (len(batch.publications), batch.more) == (MOST, True)
    readers[1].horizon = batch.horizon
    await pair.one.publications.publish(TOOLS)
    assert await readers[1].read() == [TOOLS]


@pytest.mark.parametrize("uri", ["", "\0", "\ud800", "ä" * 4097])
async def test_what_cannot_be_stored_is_refused(pair: Pair, uri: str) -> None:
    with pytest.raises(PublicationRefused):
        await pair.one.publications.publish(updated(uri))
    await pair.one.publications.publish(updated("ä" * 4096))


async def test_a_new_owner_learns_which_lists_changed_since_the_session_began(bench: Bench) -> None:
    one, two = await bench.node(), await bench.node()
    await one.publications.publish(TOOLS)
    old = await opened(one)
    await one.publications.publish(Publication(Change.PROMPTS))
    await one.publications.publish(updated(1))
    young = await opened(one)
    await bench.die(one)
    changed = []
    for session in (old, young):
        facts = await two.takeovers.take(session.key)
        assert facts is not None
        left = await two.takeovers.inherit(Ownership(session.key, facts.epoch))
        changed.append(left.changed)
    assert changed == [(Change.PROMPTS,), ()]
    assert Change.PROMPTS in LISTS
