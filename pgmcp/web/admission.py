"""Admission: who comes next when more arrives than a node does at once.

A node works on ``SLOTS`` young exchanges at a time. Callers (principals or, where nobody is known, addresses) take
turns, and within a caller its lines do: ``MOST`` of the slots are one caller's, ``SHARE`` one line's; who comes later
waits in its line. So a session that floods waits for itself, a caller with many sessions (or made-up ids of some) waits
for itself, and the others meet few of their exchanges.

Invariants:
- A slot is held until its exchange ends, for ``YOUNG_SECONDS`` at most: long calls hold none, and a database that is
  away stops no line.
- A line keeps its order. A session's requests, its other messages and its large bodies stand in lines of their own: a
  cancel, or an answer to the server's question, waits behind no request, and a flood of them waits for itself as well.
- Lines are of a caller first: nobody waits in somebody else's, whatever session he names.
- A session that nobody has shared the node with for ``ALONE_SECONDS`` may have every slot; so may such a caller.

Failure handling: who waits for too long is refused. Who goes away leaves its place, or passes on the slot that it was
given at that moment. Nothing of a message was stored while it waited.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from pgmcp.clock import Clock
from pgmcp.errors import NodeNotReady, SessionBusy
from pgmcp.types import Principal
from pgmcp.web.connection import Watch

SLOTS = 16
"""Young exchanges of a node; with fewer, groups of writes get small and many sessions lose throughput."""

MOST = 12
"""Those of one caller while others are about."""

SHARE = 4
"""Those of one line while others are about; each costs the others the time that one call takes."""

YOUNG_SECONDS = 0.1
"""Seconds for which an exchange may hold its slot; shorter than calls take under load, and a flood seeps through."""

ALONE_SECONDS = 60.0
"""Seconds after which a session, or a caller, that has the node for itself may have every slot."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever calls: the principal or, where nobody is known, the address."""

    principal: Principal
    address: str


Kind = Literal["requests", "messages", "large"]
"""What stands in a line: bodies with requests, those without, and those that nobody has looked into yet."""

_Key = tuple[Caller, str | None, Kind]


@dataclass(eq=False, slots=True)
class _Line:
    key: _Key
    of: _Lines
    held: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class _Lines:
    """One caller's."""

    caller: Caller
    held: int = 0
    all: dict[_Key, _Line] = field(default_factory=dict)
    turns: dict[_Key, _Line] = field(default_factory=dict)
    """Those that wait and may have a slot; the first is next."""


_NOBODY: object = object()


class RecentOthers:
    """Whether different ones have been about lately."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._latest, self._at = clock, _NOBODY, float("-inf")

    def seen(self, who: object) -> None:
        """Note that one is here."""
        if who != self._latest:
            self._at = self._clock.boottime() if self._latest is not _NOBODY else self._at
            self._latest = who

    def __bool__(self) -> bool:
        return self._clock.boottime() - self._at < ALONE_SECONDS


class Admission:
    """The slots of one node.

    Args:
        clock: the node's time.
        young: seconds for which an exchange may hold its slot.
    """

    def __init__(self, clock: Clock, young: float = YOUNG_SECONDS) -> None:
        self._clock, self.young = clock, young
        self._free = SLOTS
        self._callers: dict[Caller, _Lines] = {}
        self._turns: dict[Caller, _Lines] = {}  # callers with a line that waits and may have a slot; the first is next
        self._sessions, self._others = RecentOthers(clock), RecentOthers(clock)

    @property
    def callers(self) -> int:
        """Those who hold a slot or wait for one."""
        return len(self._callers.keys() | self._turns.keys())

    def __len__(self) -> int:
        return sum(len(line.waiting) for lines in self._callers.values() for line in lines.all.values())

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self._free

    @asynccontextmanager
    async def turn(
        self, caller: Caller, session: str | None, receive: Receive, *, kind: Kind, most: int, patience: float
    ) -> AsyncIterator[None]:
        """Hold a slot for as long as the context lasts, but not for longer than an exchange is young.

        Args:
            caller: whose exchange it is.
            session: the session that it names; None: it belongs to none.
            receive: tells when its client has gone; its body was read.
            kind: in which line it stands.
            most: exchanges that may wait in the line.
            patience: seconds for which this one may wait.

        Raises:
            SessionBusy: ``most`` of the line wait already.
            NodeNotReady: the patience is over, or the node leaves.
            ClientDisconnect: the client has gone while it waited.
        """
        self._sessions.seen((caller, session))
        self._others.seen(caller)
        line = self._line((caller, session, kind))
        if self._free and not line.waiting and self._line_may(line) and self._caller_may(line.of):
            self._take(line)
        else:
            await self._wait(line, receive, most, patience)
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._give_back(line)

        timer = asyncio.get_running_loop().call_later(self.young, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()

    def leave(self) -> None:
        """Refuse what waits for sessions: they go on elsewhere. Others need nothing that the node has lost."""
        for line in [
            line for lines in self._callers.values() for line in lines.all.values() if line.key[1] is not None
        ]:
            for waiting in line.waiting:
                _refuse(waiting, NodeNotReady("This node is leaving; send the same message again."))

    def _line(self, key: _Key) -> _Line:
        lines = self._callers.get(key[0])
        if lines is None:
            lines = self._callers[key[0]] = _Lines(key[0])
        line = lines.all.get(key)
        if line is None:
            line = lines.all[key] = _Line(key, lines)
        return line

    def _line_may(self, line: _Line) -> bool:
        """Whether a line may have one more slot, if its caller may."""
        return line.held < (SHARE if self._sessions else SLOTS)

    def _caller_may(self, lines: _Lines) -> bool:
        """Whether a caller may have one more slot."""
        return lines.held < (MOST if self._others else SLOTS)

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
        line.of.held += 1

    def _give_back(self, line: _Line) -> None:
        self._free += 1
        line.held -= 1
        line.of.held -= 1
        self._settle(line)

    def _settle(self, line: _Line) -> None:
        """A line has changed: put it where it belongs, then give what is free to those whose turn it is."""
        self._place(line)
        while self._free and self._turns:
            lines = self._turns.pop(next(iter(self._turns)))
            line = lines.turns.pop(next(iter(lines.turns)))
            mine = line.waiting.popleft()
            if not mine.done():  # else its client is just going
                self._take(line)
                mine.set_result(None)
            self._place(line)

    def _place(self, line: _Line) -> None:
        lines = line.of
        if line.waiting and self._line_may(line):
            lines.turns.setdefault(line.key, line)
        else:
            lines.turns.pop(line.key, None)
        if lines.turns and self._caller_may(lines):
            self._turns.setdefault(lines.caller, lines)
        else:
            self._turns.pop(lines.caller, None)
        if not line.waiting and not line.held and lines.all.get(line.key) is line:
            del lines.all[line.key]
        if not lines.all and self._callers.get(lines.caller) is lines:
            del self._callers[lines.caller]


def _refuse(waiting: asyncio.Future[None], error: Exception) -> None:
    if not waiting.done():
        waiting.set_exception(error)
