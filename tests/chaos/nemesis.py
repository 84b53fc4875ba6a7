"""What befalls a cluster, drawn from a seed: nodes are killed, frozen, sent away, cut off, and PostgreSQL crashes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.chaos.stage import Stage
from tests.harness.processes import NodeProcess
from tests.harness.proxy import Proxy
from tests.harness.servers import START, Server
from tests.harness.waiting import eventually


class Kind(StrEnum):
    """What may happen."""

    KILL = "is killed, and started again"
    LEAVE = "leaves, and is started again"
    FREEZE = "is frozen"
    APART = "and PostgreSQL do not hear each other"
    STALL = "and PostgreSQL hear each other late on the connections of now"
    LINE = "loses its line"
    POOL = "loses its pool"
    CRASH = "PostgreSQL crashes, and comes back"
    ALL = "PostgreSQL and every process of it are killed, and it comes back"


OFTEN = {
    Kind.KILL: 4,
    Kind.LEAVE: 1,
    Kind.FREEZE: 4,
    Kind.APART: 2,
    Kind.STALL: 2,
    Kind.LINE: 3,
    Kind.POOL: 3,
    Kind.CRASH: 2,
    Kind.ALL: 1,
}
AWAY = {Kind.KILL, Kind.LEAVE, Kind.FREEZE, Kind.APART, Kind.STALL}
END = 40.0
"""Seconds that a node may take to leave."""

BACK = 3.0
"""Seconds for which a node that comes back still counts as away."""


@dataclass(frozen=True, slots=True)
class Blow:
    """One thing that happens: when, what, to which node (None: to PostgreSQL), and for how many seconds."""

    at: float
    kind: Kind
    node: int | None
    lasts: float

    def __str__(self) -> str:
        who = "" if self.node is None else f"node-{self.node + 1} "
        return f"{self.at:6.2f} {who}{self.kind.value}" + (f" for {self.lasts:.2f} s" if self.lasts else "")


def schedule(seed: int, seconds: float, nodes: int = 4, down: int = 2) -> list[Blow]:
    """What happens in a time; at most ``down`` nodes are away at once, and all are back in the end."""
    draw, at = random.Random(seed), 1.0
    away: dict[int, float] = {}
    blows: list[Blow] = []
    while at < seconds:
        kind = draw.choices(list(OFTEN), list(OFTEN.values()))[0]
        lasts = _lasts(kind, draw)
        here = [node for node in range(nodes) if away.get(node, 0) <= at]
        fits = at + lasts < seconds and (kind not in AWAY or len(here) > nodes - down)
        node = None if kind in {Kind.CRASH, Kind.ALL} else draw.choice(here)
        if fits:
            blows.append(Blow(at, kind, node, lasts))
            if node is not None and kind in AWAY:
                away[node] = at + lasts + BACK
        at += draw.uniform(0.1, 2.0)
    return blows


def _lasts(kind: Kind, draw: random.Random) -> float:
    if kind in {Kind.FREEZE, Kind.APART, Kind.STALL}:
        return draw.choice((3.0, 12.0))
    return draw.uniform(0, 3) if kind in {Kind.KILL, Kind.CRASH, Kind.ALL} else 0.0


@dataclass(frozen=True, slots=True)
class Member:
    """A node, and what stands between it and PostgreSQL."""

    node: NodeProcess
    way: Proxy


class Nemesis:
    """Does what a schedule says."""

    def __init__(self, stage: Stage, members: Sequence[Member], server: Server) -> None:
        self._stage, self._members, self._server = stage, members, server
        self._turn = asyncio.Lock()
        self._turns = [asyncio.Lock() for _ in members]

    async def run(self, blows: Sequence[Blow]) -> None:
        """Return when everything has happened, and whatever was taken away is back."""
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for blow in blows:
                await asyncio.sleep(began + blow.at - asyncio.get_running_loop().time())
                group.create_task(self._strike(blow))

    async def _strike(self, blow: Blow) -> None:
        if blow.node is None:
            await self._crash(blow)
            return
        node, way = self._members[blow.node].node, self._members[blow.node].way
        match blow.kind:
            case Kind.KILL | Kind.LEAVE:
                async with self._turns[blow.node]:  # on a busy machine it may take long to leave
                    node.signal(signal.SIGKILL if blow.kind is Kind.KILL else signal.SIGTERM)
                    await eventually(lambda: not node.running, f"{node.name} has ended", END)
                    await asyncio.sleep(blow.lasts)
                    node.start()
            case Kind.FREEZE:
                node.pause()
                await asyncio.sleep(blow.lasts)
                node.resume()
            case Kind.APART:
                way.black_hole = True
                await asyncio.sleep(blow.lasts)
                way.black_hole = False
            case Kind.STALL:
                await way.stall(blow.lasts)
            case Kind.LINE | Kind.POOL:
                way.cut_all(listening=blow.kind is Kind.LINE)

    async def _crash(self, blow: Blow) -> None:
        async with self._turn:
            await asyncio.to_thread(self._server.crash if blow.kind is Kind.CRASH else self._server.kill)
            await asyncio.sleep(blow.lasts)
            self._server.start(wait=False)
            await eventually(lambda: self._server.state == "ready", "PostgreSQL is back", START)
