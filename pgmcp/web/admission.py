"""Admission: who comes next when more arrives than a node does at once.

A node works on ``SLOTS`` young exchanges at a time, ``SHARE`` of them of one line; who comes later waits in its line,
and the lines take turns. So a session that floods waits for itself, and the others meet few of its exchanges. What
belongs to no session (2026-07-28) stands in the line of its caller.

Invariants:
- A slot is held until its exchange ends, for ``YOUNG`` at most: long calls hold none, and a database that is away
  stops no line.
- A line keeps its order. A session's requests and its other messages stand in lines of their own: a cancel, or an
  answer to the server's question, waits behind no request, and a flood of them waits for itself as well.
- A session that nobody has shared the node with for ``ALONE`` may have every slot.

Failure handling: who waits for too long is refused. Who goes away leaves its place, or passes on the slot that it was
given at that moment. Nothing of a message was stored while it waited.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from pgmcp.clock import Clock
from pgmcp.errors import NodeNotReady, SessionBusy
from pgmcp.types import Principal
from pgmcp.web.connection import Watch

SLOTS = 16
"""Young exchanges of a node; with fewer, groups of writes get small and many sessions lose throughput."""

SHARE = 4
"""Those of one line while others are about; each costs the others the time that one call takes."""

YOUNG = 0.1
"""Seconds for which an exchange may hold its slot; shorter than calls take under load, and a flood seeps through."""

ALONE = 60.0
"""Seconds after which a session that has the node for itself may have every slot."""


@dataclass(frozen=True, slots=True)
class Guest:
    """In place of a session, whoever calls without one: the principal or, where nobody is known, the address."""

    principal: Principal
    address: str


Session = Hashable
_Key = tuple[Session, bool]


@dataclass(eq=False, slots=True)
class _Line:
    key: _Key
    held: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Admission:
    """The slots of one node.

    Args:
        clock: the node's time.
        young: seconds for which an exchange may hold its slot.
    """

    def __init__(self, clock: Clock, young: float = YOUNG) -> None:
        self._clock, self._young = clock, young
        self._free = SLOTS
        self._lines: dict[_Key, _Line] = {}
        self._turns: dict[_Key, _Line] = {}  # lines that wait and may have a slot; the first is next
        self._latest: Session | None = None
        self._shared = float("-inf")

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines.values())

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self._free

    @asynccontextmanager
    async def turn(
        self, session: Session, receive: Receive, *, asks: bool, most: int, patience: float
    ) -> AsyncIterator[None]:
        """Hold a slot for as long as the context lasts, but not for longer than an exchange is young.

        Args:
            session: whose exchange it is.
            receive: tells when its client has gone; its body was read.
            asks: whether it carries requests; what does not has a line of its own.
            most: exchanges that may wait in the line.
            patience: seconds for which this one may wait.

        Raises:
            SessionBusy: ``most`` of the line wait already.
            NodeNotReady: the patience is over, or the node leaves.
            ClientDisconnect: the client has gone while it waited.
        """
        if session != self._latest:
            self._shared = self._clock.boottime() if self._latest is not None else self._shared
            self._latest = session
        line = self._lines.setdefault((session, asks), _Line((session, asks)))
        if self._free and not line.waiting and line.held < self._share:
            self._take(line)
        else:
            await self._wait(line, receive, most, patience)
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._give_back(line)

        timer = asyncio.get_running_loop().call_later(self._young, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()

    def leave(self) -> None:
        """Refuse what waits for sessions: they go on elsewhere. Guests need nothing that the node has lost."""
        for line in self._lines.values():
            for waiting in () if isinstance(line.key[0], Guest) else line.waiting:
                _refuse(waiting, NodeNotReady("This node is leaving; send the same message again."))

    @property
    def _share(self) -> int:
        return SHARE if self._clock.boottime() - self._shared < ALONE else SLOTS

    async def _wait(self, line: _Line, receive: Receive, most: int, patience: float) -> None:
        if len(line.waiting) >= most:
            message = f"{most} messages wait in this line already; wait for answers before you send more."
            raise SessionBusy(message)
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[None] = loop.create_future()
        late = NodeNotReady("This node has more to do than it can; try again or ask another one.")
        timer = loop.call_later(patience, _refuse, mine, late)
        line.waiting.append(mine)
        self._settle(line)
        try:
            with Watch(receive, lambda: _refuse(mine, ClientDisconnect())):
                await mine
        except BaseException:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self._give_back(line)
            else:
                if mine in line.waiting:
                    line.waiting.remove(mine)
                self._settle(line)
            raise
        finally:
            timer.cancel()

    def _take(self, line: _Line) -> None:
        self._free -= 1
        line.held += 1

    def _give_back(self, line: _Line) -> None:
        self._free += 1
        line.held -= 1
        self._settle(line)

    def _settle(self, line: _Line) -> None:
        """A line has changed: put it where it belongs, then give what is free to those whose turn it is."""
        self._place(line)
        while self._free and self._turns:
            line = self._turns.pop(next(iter(self._turns)))
            mine = line.waiting.popleft()
            if not mine.done():  # else its client is just going
                self._take(line)
                mine.set_result(None)
            self._place(line)

    def _place(self, line: _Line) -> None:
        if line.waiting and line.held < self._share:
            self._turns.setdefault(line.key, line)
        else:
            self._turns.pop(line.key, None)
        if not line.waiting and not line.held and self._lines.get(line.key) is line:
            del self._lines[line.key]


def _refuse(waiting: asyncio.Future[None], error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)
