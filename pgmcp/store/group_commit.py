"""Group commit: what arrives while a statement is in flight goes into the next one.

Invariants:
- One statement of a group is in flight at a time, apart from those of parked keys; rows of one key are committed in the
  order in which they came.
- A row of more than ``LARGE_BYTES`` has a statement of its own, beside which those of other keys go on.
- A row that was put in is sent, also when its caller has gone. One without a patience is never dropped, so that rows
  of one key leave no gap: what has a number waits for as long as the database is away.
- A statement that failed for want of the database is repeated whole. One that failed for a row's sake is repeated row
  by row, so that only the guilty row fails; one that met another transaction's lock parks the key of the row that did,
  and strangers go on without it.

Failure handling: a row waits at most its ``patience``, if it has one, for trust as for the database; then its caller
gets ``DatabaseUnavailable`` and the row, if it still waits, is dropped. Whatever else goes wrong settles the rows that
it concerns, and the queue goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import asyncpg

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.store.connection.error_text import error_text
from pgmcp.store.connection.failures import ANSWERED, CONTENTION, TROUBLE
from pgmcp.store.database import BACKOFF_SECONDS
from pgmcp.store.statements import LockWait

logger = logging.getLogger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")

ROWS = 256
BYTES = 4 * 1024 * 1024
QUEUE_ROWS = 4096
UNEXPECTED = "The write failed; look at the node's log."
LATE = "PostgreSQL did not take the write in time; try again."
LARGE_BYTES = 256 * 1024
"""Bytes from which a row goes alone: PostgreSQL takes some 10 ms for a megabyte, and the group would wait for it."""

PARKED = 2
"""Statements for parked keys that may be in flight: each may hold a connection for as long as it waits for a lock."""


@dataclass(slots=True)
class _Waiting(Generic[Row, Result]):
    row: Row
    key: Hashable
    size: int
    until: float
    done: asyncio.Future[Result]


async def _open() -> None:
    return None


class GroupCommit(Generic[Row, Result]):
    """A queue of rows for one statement.

    Args:
        send: runs the statement for some rows and returns one result (or error) for each. Its locks it waits for as
            long as it is told.
        clock: the node's time.
        key: rows of one key stay in order, and wait for each other when they meet a lock.
        gate: awaited before each statement; owners wait here for trust. What it raises, every waiting row gets.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Row], LockWait], Awaitable[Sequence[Result | PgmcpError]]],
        clock: Clock,
        key: Callable[[Row], Hashable],
        gate: Callable[[], Awaitable[None]] = _open,
    ) -> None:
        self._send, self._clock, self._key, self._gate = send, clock, key, gate
        self._waiting: deque[_Waiting[Row, Result]] = deque()
        self._rest: deque[_Waiting[Row, Result]] = deque()  # of a batch that is sent row by row
        self._parked: dict[Hashable, deque[_Waiting[Row, Result]]] = {}
        self._room, self._retries = asyncio.Semaphore(QUEUE_ROWS), asyncio.Semaphore(PARKED)
        self._runner: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Rows that wait for the next statement; those of parked keys stand apart."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether rows wait, or are being sent."""
        return self._runner is not None or bool(self._parked)

    async def put(self, row: Row, *, patience: float | None, size: int = 0) -> Result:
        """Send a row with the next statement and wait for its result.

        Args:
            row: what the statement takes.
            patience: seconds for which the row may wait; None for a row that must not be dropped.
            size: its bytes, as far as they matter.

        Raises:
            DatabaseUnavailable: the patience is over.
            PgmcpError: the result of this row is an error.
        """
        await self._room.acquire()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Result] = loop.create_future()
        until = math.inf if patience is None else self._clock.boottime() + patience
        waiting = _Waiting(row, self._key(row), size, until, done)
        if patience is not None:
            late = loop.call_later(patience, _settle, [waiting], [DatabaseUnavailable(LATE)])  # also while one hangs
            done.add_done_callback(lambda _: late.cancel())
        done.add_done_callback(lambda _: self._room.release())
        if waiting.key in self._parked:
            self._parked[waiting.key].append(waiting)
        else:
            self._waiting.append(waiting)
            if self._runner is None:
                self._runner = asyncio.create_task(self._run())
        return await asyncio.shield(done)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._next()
        finally:
            self._runner = None

    async def _next(self) -> None:
        first, batch = self._waiting[0], list[_Waiting[Row, Result]]()
        try:
            if batch := self._take():
                await self._settled(batch)
        except Exception:
            logger.exception("a group of writes failed in a way that nobody expected; those after it go on")
            if self._waiting and self._waiting[0] is first:
                self._waiting.popleft()
            self._rest.clear()
            failed = [first, *batch]
            _settle(failed, [PgmcpError(UNEXPECTED)] * len(failed))

    def _take(self) -> list[_Waiting[Row, Result]]:
        batch: list[_Waiting[Row, Result]] = []
        size = 0
        while self._waiting and len(batch) < ROWS and (not batch or size + self._waiting[0].size <= BYTES):
            waiting = self._waiting.popleft()
            if waiting.done.done():
                continue
            if waiting.size > LARGE_BYTES:
                if any(before.key == waiting.key for before in batch):
                    self._waiting.appendleft(waiting)  # those go first
                    break
                self._park(waiting, tries=0)
                continue
            batch.append(waiting)
            size += waiting.size
        return batch

    async def _settled(self, batch: list[_Waiting[Row, Result]], lock_wait: LockWait = LockWait.USUAL) -> None:
        """Send a batch until every row of it is settled or parked."""
        tries = 0
        while batch:
            error = await self._attempt(batch, lock_wait, confirm=tries > 0)
            if error is None:
                return
            if len(batch) > 1 and not isinstance(error, TROUBLE):
                self._rest = deque(batch)
                while self._rest:  # each locked row holds up those after it: it waits on when it is parked
                    await self._settled([self._rest.popleft()], LockWait.BRIEF)
                return
            if isinstance(error, CONTENTION):
                self._park(batch[0], tries=1)
                return
            batch = self._patient(batch, error)
            await self._clock.sleep(BACKOFF_SECONDS[min(tries, len(BACKOFF_SECONDS) - 1)])
            tries += 1

    async def _attempt(
        self, batch: list[_Waiting[Row, Result]], lock_wait: LockWait, *, confirm: bool
    ) -> Exception | None:
        """Send a batch once; the error if it may be sent again, in whole or in parts.

        Args:
            confirm: send it twice and take the second answer. A first try whose reply was lost may commit while the
                repeat runs, which then waits for its locks but cannot see its rows; the next statement sees them.
        """
        try:
            soonest = min(waiting.until for waiting in batch)
            async with asyncio.timeout(None if soonest == math.inf else max(0.0, soonest - self._clock.boottime())):
                await self._gate()
            rows = [waiting.row for waiting in batch]
            if confirm:
                await self._send(rows, lock_wait)
            results = await self._send(rows, lock_wait)
        except (*TROUBLE, *CONTENTION, *ANSWERED) as error:
            return error
        except asyncpg.PostgresError as error:
            if len(batch) > 1:
                return error
            _settle(batch, [PgmcpError(f"PostgreSQL refused the row: {error_text(error)}")])
        except PgmcpError as error:
            _settle(batch, [error] * len(batch))
        except Exception:
            logger.exception("a grouped write failed")
            _settle(batch, [PgmcpError(UNEXPECTED)] * len(batch))
        except BaseException:
            _settle(batch, [PgmcpError("The node stopped before the write was sent.")] * len(batch))
            raise
        else:
            _settle(batch, results)
        return None

    def _park(self, waiting: _Waiting[Row, Result], *, tries: int) -> None:
        """Send a row apart, and behind it what came after it under its key: before what may come from now on."""
        rows = self._parked[waiting.key] = deque([waiting])
        for queue in (self._rest, self._waiting):
            rows.extend(row for row in queue if row.key == waiting.key)
            others = [row for row in queue if row.key != waiting.key]
            queue.clear()
            queue.extend(others)
        task = asyncio.create_task(self._one_by_one(waiting.key, tries))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one_by_one(self, key: Hashable, tries: int) -> None:
        """Send the rows of a parked key one by one, until there are none."""
        rows = self._parked[key]
        try:
            while rows:
                async with self._retries:
                    error = await self._attempt([rows[0]], LockWait.USUAL, confirm=tries > 0)
                if error is None or not self._patient([rows[0]], error):
                    rows.popleft()
                    tries = 0
                    continue
                await self._clock.sleep(BACKOFF_SECONDS[min(tries, len(BACKOFF_SECONDS) - 1)])
                tries += 1
        except Exception:
            logger.exception("a parked write failed in a way that nobody expected; those after it go on")
            _settle(rows, [PgmcpError(UNEXPECTED)] * len(rows))
        finally:
            del self._parked[key]
            _settle(rows, [PgmcpError("The node stopped before the write was sent.")] * len(rows))

    def _patient(self, batch: list[_Waiting[Row, Result]], error: BaseException) -> list[_Waiting[Row, Result]]:
        """Those rows that may still wait; the others are settled."""
        now = self._clock.boottime()
        message = f"PostgreSQL did not take the write in time ({error_text(error)}); try again."
        late = [waiting for waiting in batch if waiting.until <= now]
        _settle(late, [DatabaseUnavailable(message)] * len(late))
        return [waiting for waiting in batch if waiting.until > now]


def _settle(batch: Iterable[_Waiting[Row, Result]], results: Iterable[Result | PgmcpError]) -> None:
    for waiting, result in zip(batch, results, strict=True):
        if waiting.done.done():
            continue
        if isinstance(result, PgmcpError):
            waiting.done.set_exception(result)
            waiting.done.exception()  # a caller that has gone leaves no "exception was never retrieved" behind
        else:
            waiting.done.set_result(result)
