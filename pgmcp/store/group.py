"""Group commit: what arrives while a statement is in flight goes into the next one.

Invariants:
- One statement of a group is in flight at a time, so rows are committed in the order in which they came.
- A row that was put in is sent, also when its caller has gone: numbers that were given out leave no gap.
- A statement that failed for want of the database is repeated whole; one that failed for a row's sake is repeated
  row by row, so that only the guilty row fails.

Failure handling: a row waits at most its ``patience``; then its caller gets ``DatabaseUnavailable`` and the row, if it
still waits, is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import asyncpg

from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.store.database import BACKOFF, CONTENTION, TROUBLE

Row = TypeVar("Row")
Result = TypeVar("Result")

ROWS = 256
BYTES = 4 * 1024 * 1024
BOUND = 4096


@dataclass(slots=True)
class _Waiting(Generic[Row, Result]):
    row: Row
    size: int
    until: float
    done: asyncio.Future[Result]


async def _open() -> None:
    return None


class Group(Generic[Row, Result]):
    """A queue of rows for one statement.

    Args:
        send: runs the statement for some rows and returns one result (or exception) for each.
        clock: the node's time.
        gate: awaited before each statement; owners wait here for trust. What it raises, every waiting row gets.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Row]], Awaitable[Sequence[Result | PgmcpError]]],
        clock: Clock,
        gate: Callable[[], Awaitable[None]] = _open,
    ) -> None:
        self._send, self._clock, self._gate = send, clock, gate
        self._waiting: deque[_Waiting[Row, Result]] = deque()
        self._room = asyncio.Semaphore(BOUND)
        self._runner: asyncio.Task[None] | None = None

    async def put(self, row: Row, *, patience: float, size: int = 0) -> Result:
        """Send a row with the next statement and wait for its result.

        Args:
            row: what the statement takes.
            patience: seconds for which the row may wait for the database.
            size: its bytes, as far as they matter.

        Raises:
            DatabaseUnavailable: the patience is over.
            PgmcpError: the result of this row is an error.
        """
        async with self._room:
            done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
            self._waiting.append(_Waiting(row, size, self._clock.boottime() + patience, done))
            if self._runner is None:
                self._runner = asyncio.create_task(self._run())
            return await asyncio.shield(done)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._statement(self._take())
        finally:
            self._runner = None

    def _take(self) -> list[_Waiting[Row, Result]]:
        batch = [self._waiting.popleft()]
        size = batch[0].size
        while self._waiting and len(batch) < ROWS and size + self._waiting[0].size <= BYTES:
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        return batch

    async def _statement(self, batch: list[_Waiting[Row, Result]]) -> None:
        tries = 0
        while batch:
            try:
                await self._gate()
                results = await self._send([waiting.row for waiting in batch])
            except (*TROUBLE, *CONTENTION) as error:
                if isinstance(error, CONTENTION) and len(batch) > 1:
                    return await self._row_by_row(batch)
                batch = self._patient(batch, error)
                await self._clock.sleep(BACKOFF[min(tries, len(BACKOFF) - 1)])
                tries += 1
            except asyncpg.PostgresError as error:
                if len(batch) > 1:
                    return await self._row_by_row(batch)
                return _settle(batch[0].done, PgmcpError(f"PostgreSQL refused the row: {error}"))
            except PgmcpError as error:
                return _settle_all(batch, [error] * len(batch))
            except BaseException:
                _settle_all(batch, [PgmcpError("The write ended without an answer; look at the log.")] * len(batch))
                raise
            else:
                return _settle_all(batch, results)
        return None

    async def _row_by_row(self, batch: list[_Waiting[Row, Result]]) -> None:
        for waiting in batch:
            await self._statement([waiting])

    def _patient(self, batch: list[_Waiting[Row, Result]], error: BaseException) -> list[_Waiting[Row, Result]]:
        now = self._clock.boottime()
        for waiting in batch:
            if waiting.until <= now:
                message = f"PostgreSQL did not take the write in time ({type(error).__name__}: {error}); try again."
                _settle(waiting.done, DatabaseUnavailable(message))
        return [waiting for waiting in batch if waiting.until > now]


def _settle_all(batch: Sequence[_Waiting[Row, Result]], results: Sequence[Result | PgmcpError]) -> None:
    for waiting, result in zip(batch, results, strict=True):
        _settle(waiting.done, result)


def _settle(done: asyncio.Future[Result], result: Result | PgmcpError) -> None:
    if done.done():
        return
    if isinstance(result, PgmcpError):
        done.set_exception(result)
        done.exception()  # a caller that has gone must not leave "exception was never retrieved" behind
    else:
        done.set_result(result)
