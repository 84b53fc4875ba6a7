"""A small cluster with one session, for tests that say step by step what happens to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tests.harness.clock import FakeClock, StillLoop, settle
from tests.property.nodes import SimNode
from tests.property.world import Call, World

Result = TypeVar("Result")


class Scene:
    """Three nodes, and a session of the first one."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.loop = StillLoop(self.clock)
        self.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        self.world = World(self.clock, 3)
        await self.clock.advance(1)
        self.session = self.world.open_session(self.world.nodes[0])
        await self.clock.advance(1)
        self.owner: SimNode = self.world.nodes[0]

    def call(self, *, safe: bool = True, seconds: float = 0.0) -> Call:
        """A call of the client, at a node that is not the owner."""
        return self.do(lambda: self.world.call_tool(self.session, self.world.nodes[1], safe=safe, seconds=seconds))

    def do(self, what: Callable[[], Result]) -> Result:
        """Do something in the nodes' event loop, and let it settle."""

        async def within() -> Result:
            result = what()
            await settle()
            return result

        return self.loop.run_until_complete(within())

    def passes(self, seconds: float) -> None:
        """Time passes, and nothing is wrong after it."""
        self.loop.run_until_complete(self.clock.advance(seconds))
        self.world.check()

    def ends_well(self) -> None:
        """Everything that was acknowledged ends."""
        self.loop.run_until_complete(self.world.clear_up())
        self.world.check_end()

    def close(self) -> None:
        self.loop.run_until_complete(self.world.close())
        self.loop.close()
