"""The publication reader: each publication once, and one invalidation after a gap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence

import pytest

from pgmcp.cluster.publications import ABSENT_SECONDS, PAUSE_SECONDS, PublicationReader
from pgmcp.errors import DatabaseUnavailable
from pgmcp.service import Faults
from pgmcp.types import LISTS, Change, Horizon, Publication, PublicationBatch
from tests.harness.clock import FakeClock

TOOLS, PROMPTS = Publication(Change.TOOLS), Publication(Change.PROMPTS)


def updated(uri: str) -> Publication:
    return Publication(Change.UPDATED, uri)


class Table:
    """Publications in a list."""

    def __init__(self) -> None:
        self.said: list[Publication] = []
        self.away = self.more = False
        self.reads: list[Horizon | None] = []
        self.before_reply: Callable[[], None] = lambda: None

    async def publish(self, publication: Publication) -> None:
        self.said.append(publication)

    async def read(self, since: Horizon | None) -> PublicationBatch:
        self.reads.append(since)
        await asyncio.sleep(0)
        if self.away:
            message = "away"
            raise DatabaseUnavailable(message)
        batch = PublicationBatch(Horizon(str(len(self.said))), tuple(self.said[int(since or 0) :]), self.more)
        self.before_reply()
        return batch


class Scene:
    def __init__(self) -> None:
        self.table, self.clock = Table(), FakeClock()
        self.told: list[Publication] = []
        self.gaps: list[set[Change]] = []
        self.broken, self.faults = False, Faults()
        self.publication_reader = PublicationReader(
            self.table, self.clock, on_publications=self.tell, on_gap=self.missed, faults=self.faults
        )

    async def tell(self, publications: Sequence[Publication]) -> None:
        if self.broken:
            raise RuntimeError
        self.told += publications

    async def missed(self, changed: Collection[Change]) -> None:
        self.gaps.append(set(changed))

    async def publish(self, *publications: Publication) -> None:
        for publication in publications:
            await self.table.publish(publication)
        self.publication_reader.look()
        await self.clock.advance(PAUSE_SECONDS)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    await made.publication_reader.start()
    made.gaps.clear()
    running = asyncio.create_task(made.publication_reader.run())
    yield made
    running.cancel()


async def test_nothing_is_told_before_it_has_begun() -> None:
    scene = Scene()
    await scene.publish(TOOLS, updated("a"))
    assert scene.table.reads == []
    await scene.publication_reader.start()
    assert (scene.told, scene.gaps) == ([], [{Change.TOOLS}])


async def test_each_is_told_once(scene: Scene) -> None:
    await scene.publish(TOOLS)
    await scene.publish()
    await scene.publish(updated("a"), TOOLS)
    assert (scene.told, scene.gaps) == ([TOOLS, updated("a"), TOOLS], [])


async def test_a_wake_up_during_a_look_makes_another(scene: Scene) -> None:
    def late() -> None:
        scene.table.before_reply = lambda: None
        scene.table.said.append(PROMPTS)
        scene.publication_reader.look()

    scene.table.before_reply = late
    await scene.publish(TOOLS)
    assert scene.told == [TOOLS, PROMPTS]
    assert len(scene.table.reads) == 3


async def test_a_lost_line_is_one_gap(scene: Scene) -> None:
    await scene.table.publish(TOOLS)
    scene.publication_reader.look(gap=True)
    scene.publication_reader.look()
    await scene.clock.advance(PAUSE_SECONDS)
    assert (scene.told, scene.gaps) == ([], [{Change.TOOLS}])
    await scene.publish(PROMPTS)
    assert (scene.told, len(scene.gaps)) == ([PROMPTS], 1)


async def test_an_outage_delays(scene: Scene) -> None:
    scene.table.away = True
    await scene.publish(TOOLS)
    assert scene.told == []
    scene.table.away = False
    await scene.publication_reader.poll()
    await scene.clock.advance(PAUSE_SECONDS)
    assert (scene.told, scene.gaps) == ([TOOLS], [])


@pytest.mark.parametrize("order", ["gap first", "gap later"])
async def test_a_gap_outlives_an_outage(scene: Scene, order: str) -> None:
    scene.table.away = True
    for gap in (True, False) if order == "gap first" else (False, True):
        scene.publication_reader.look(gap=gap)
        await scene.clock.advance(PAUSE_SECONDS)
    scene.table.away = False
    await scene.publication_reader.poll()
    await scene.clock.advance(PAUSE_SECONDS)
    assert len(scene.gaps) == 1


async def test_an_absence_is_a_gap(scene: Scene) -> None:
    scene.clock.jump(ABSENT_SECONDS)
    await scene.publish(TOOLS)
    assert scene.told == [TOOLS]
    scene.clock.jump(ABSENT_SECONDS + 1)
    await scene.publish(PROMPTS)
    assert (scene.told, scene.gaps) == ([TOOLS], [{Change.TOOLS, Change.PROMPTS}])


async def test_too_many_are_a_gap_of_everything(scene: Scene) -> None:
    scene.table.more = True
    await scene.publish(updated("a"))
    assert (scene.told, scene.gaps) == ([], [set(LISTS)])


async def test_a_listener_that_breaks_it_is_made_up_for(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.broken = True
    await scene.publish(TOOLS)
    scene.broken = False
    await scene.publish()
    assert scene.gaps == [{Change.TOOLS}]
    assert scene.faults.counts == {"telling publications": 1}
    assert "RuntimeError" in caplog.text
