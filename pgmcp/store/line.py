"""The line: the node's one direct connection, for LISTEN, renewals and self-probes, and nothing else.

Invariants:
- LISTEN is committed before ``on_reset`` is called: nothing falls between.
- The callback only marks ids; it never blocks, so that this backend never holds back the notification queue.
- Channels are open to whoever may connect: what is heard on each is bounded (``Allowance``), the channel of all nodes
  apart from this one's own, whose name only those know who may read ``nodes``. What is more is not read; a look at the
  tables stands for it.
- Every call has a deadline, in time in which the event loop ran: a node that was slow itself does not blame the line. A
  line on which a call failed is aborted, not closed: closing waits for the dead peer.

Failure handling: a lost line is reopened with a backoff of at most half a second, for as long as the node runs.
Meanwhile the node polls and renews on the pool; where that fails too, it stays trusted until its trust ends. A line
whose own notification does not come back within the deadline is lost too, whatever the socket says. While the channel
of all nodes is flooded, or this line's notifications are late again and again (PostgreSQL has one queue for all
channels, and whoever listens reads all of it), the node listens to nothing, and polls instead.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import partial
from typing import Any, Protocol, TypeVar

import asyncpg

from pgmcp.clock import Clock, Ids
from pgmcp.errors import DatabaseUnavailable
from pgmcp.service import Service
from pgmcp.settings import Settings
from pgmcp.store.channel_allowance import Allowance
from pgmcp.store.connection.address import AddressUnread
from pgmcp.store.connection.error_text import REFUSALS, error_text
from pgmcp.store.connection.failures import ANSWERED, TROUBLE, unavailable
from pgmcp.store.database import Database
from pgmcp.store.notifier import channel
from pgmcp.store.statements import statement
from pgmcp.types import NodeId, NodeState

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PROBE = "probe:"
PROBE_SECONDS = 5.0
"""Seconds between self-probes."""

LATE_SECONDS = 0.5
"""Seconds after which the line's own notification is late, and those of others are."""

SOON_SECONDS = 0.5
"""Seconds until the next self-probe when one was late."""

LAG_SECONDS = 0.1
"""Seconds by which a deadline that passes later than it should shows that the event loop stood."""

OWN, EVERYBODYS = (1000, 128 * 1024), (500, 32 * 1024)
"""Payloads and characters that are read in each window: of what is said to this node, and to all nodes."""

QUIET_SECONDS, LONGEST_QUIET_SECONDS = 10.0, 60.0
"""Seconds for which nothing is listened to when it is flooded, or late; twice as many when it is again, at most."""

BUFFER_BYTES = 64 * 1024
"""Bytes that the kernel keeps for the line; answers are small, and a flood is not to be read."""

REOPEN_SECONDS = (0.05, 0.1, 0.2, 0.5)
KEEPALIVES = {"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3"}
KEEPALIVES["tcp_user_timeout"] = "12000"  # milliseconds


class OnReset(Protocol):
    """What is called when the line is open."""

    def __call__(self, *, crashed: bool) -> None:
        """Look at the tables.

        Args:
            crashed: PostgreSQL may have crashed since the line was open before: transactions that nobody waited for are
                lost, and their ids are given out anew.
        """
        ...


class Line(Service):
    """One node's line; also its ``LeaseTable``.

    Args:
        settings: where to connect, and the deadlines.
        node: whose channel and row this is.
        on_payload: called with each payload for this node.
        on_broadcast: called with each payload for all nodes.
        on_reset: called after each (re)opening, when LISTEN is in force, and when there is too much to read: wake-ups
            may have been lost.
        on_lost: called when the line is lost.
        database: the pool, for renewals while the line is down.
    """

    def __init__(
        self,
        settings: Settings,
        node: NodeId,
        clock: Clock,
        ids: Ids,
        *,
        on_payload: Callable[[str], None],
        on_broadcast: Callable[[str], None],
        on_reset: OnReset,
        on_lost: Callable[[], None],
        database: Database,
    ) -> None:
        self._settings, self._node, self._clock, self._ids = settings, node, clock, ids
        self._on_payload, self._on_broadcast = on_payload, on_broadcast
        self._on_reset, self._tell_lost = on_reset, on_lost
        self._database = database
        self._connection: asyncpg.Connection | None = None
        self._started_at: datetime | None = None
        self._recovered_at: datetime | None = None
        self._turn = asyncio.Lock()
        self._lost, self._echo, self._why = asyncio.Event(), asyncio.Event(), ""
        self._expected = ""
        self._own, self._everybodys = (channel(settings.schema_name, each) for each in (node, None))
        self._allowances = {self._own: Allowance(clock, *OWN), self._everybodys: Allowance(clock, *EVERYBODYS)}
        self._jammed, self._late = asyncio.Event(), False

    @property
    def up(self) -> bool:
        """Whether it is open."""
        return self._connection is not None

    @property
    def deaf(self) -> bool:
        """Whether there are wake-ups that cannot be heard, or not in time."""
        return not self.up or self._jammed.is_set()

    @property
    def dropped(self) -> int:
        """Payloads that were too many to be read."""
        return sum(allowance.dropped for allowance in self._allowances.values())

    async def start(self) -> None:
        """Connect and listen.

        Raises:
            DatabaseUnavailable: PostgreSQL cannot be reached within the deadlines.
        """
        try:
            await self._connect()
        except (*TROUBLE, asyncpg.PostgresError) as error:
            message = f"The line to PostgreSQL cannot be opened ({error_text(error)}). Check --listen-url."
            raise DatabaseUnavailable(message) from error

    async def stop(self) -> None:
        """Stop listening and hang up."""
        self._drop()

    async def renew(self) -> float | None:
        """See ``LeaseTable.renew``.

        Raises:
            DatabaseUnavailable: there was no answer within the deadline.
        """
        known = self._database.timeline.known
        if self._connection is not None:
            rows = await self._ask("renew", self._node, self._settings.ttl, self._started_at)
        else:
            rows = await self._renew_on_pool()
        if rows:
            self._database.timeline.renewed(known, self._node, rows[0]["at"])
        return rows[0]["at"] if rows else None

    async def _renew_on_pool(self) -> list[asyncpg.Record]:
        try:
            async with asyncio.timeout(self._settings.deadline):
                return await self._database.ask("renew", self._node, self._settings.ttl, None)
        except TimeoutError as error:
            message = "PostgreSQL answered on no connection of this node in time: look at the network and at the load."
            raise DatabaseUnavailable(message) from error

    async def set_state(self, state: NodeState) -> bool:
        """See ``LeaseTable.set_state``.

        Raises:
            DatabaseUnavailable: the line is down or did not answer within the deadline.
        """
        return bool(await self._ask("set_state", self._node, state))

    async def _connect(self) -> None:
        seconds = self._settings.statement_timeout
        connection = await self._database.connect(
            self._settings.line_url,
            timeout=seconds,
            server_settings=KEEPALIVES | {"application_name": f"pgmcp {self._settings.node_name} line"},
        )
        _set_up(connection)
        self._lost.clear()
        self._why = ""
        connection.add_termination_listener(self._on_lost)
        listens = not self._jammed.is_set()
        try:
            if listens:
                await self._listen(connection)
            (started,) = await connection.fetch(statement("line_started", self._settings.schema_name))
        except BaseException:
            connection.terminate()
            raise
        self._connection, self._started_at = connection, started["backend_start"]
        before, self._recovered_at = self._recovered_at, started["recovered_at"]
        self._on_reset(crashed=before != self._recovered_at)
        if listens == self._jammed.is_set():
            self._lost.set()  # a jam has begun or ended meanwhile: once more

    async def run(self) -> None:
        """Keep the line open, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._stay_open())
            group.create_task(self._sit_jams_out())

    async def _sit_jams_out(self) -> None:
        """Listen to nothing while there is more than can be read; try now and then whether it still is.

        What PostgreSQL and the sockets hold for a line that has listened goes with it.
        """
        quiet = QUIET_SECONDS / 2
        while True:
            again = await self._clock.wait(self._jammed, QUIET_SECONDS)
            quiet = min(2 * quiet, LONGEST_QUIET_SECONDS) if again else QUIET_SECONDS
            await self._jammed.wait()
            logger.warning("wake-ups are too many, or late: this node listens to none, and polls, for %g s", quiet)
            self._lost.set()
            await self._clock.sleep(self._ids.jitter(quiet))
            self._allowances[self._everybodys].calm()
            self._jammed.clear()
            if self._connection is not None:
                try:
                    await self._in_time(self._in_turn(partial(self._listen, self._connection)))
                except (*TROUBLE, asyncpg.PostgresError):
                    self._lost.set()
            self._on_reset(crashed=False)

    async def _listen(self, connection: asyncpg.Connection) -> None:
        for name in (self._own, self._everybodys):
            await connection.add_listener(name, self._on_notification)

    async def _stay_open(self) -> None:
        """Probe the line, and open it again when it is lost, for ever."""
        tries, told = 0, set[str]()
        while True:
            if await self._alive():
                if tries and not self._jammed.is_set():
                    logger.warning("the line to PostgreSQL is open again")
                tries = 0
                told.clear()
                continue
            if not tries and not self._jammed.is_set():
                logger.warning("the line to PostgreSQL was lost (%s); the node polls until it is open again", self._why)
            self._drop()
            self._tell_lost()
            await self._clock.sleep(self._ids.jitter(REOPEN_SECONDS[min(tries, len(REOPEN_SECONDS) - 1)]))
            tries += 1
            try:
                await self._connect()
            except (*TROUBLE, asyncpg.PostgresError) as error:
                reason = error_text(error)
                if isinstance(error, (*REFUSALS, AddressUnread)) and reason not in told:  # trying again mends nothing
                    told.add(reason)
                    logger.warning("the line to PostgreSQL cannot be opened, until this is mended: %s", reason)

    async def _alive(self) -> bool:
        """Wait until the next probe is due or the line is lost, then probe."""
        if self._connection is None or await self._clock.wait(
            self._lost, SOON_SECONDS if self._late else PROBE_SECONDS
        ):
            return False
        if self._jammed.is_set():
            return True  # renewals tell whether it is
        before, begun = self._late, self._clock.boottime()
        probe = asyncio.create_task(self._probe())
        probe.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks when the node stops
        try:
            done, _ = await asyncio.wait({probe}, timeout=LATE_SECONDS)
            self._late = not done and self._clock.boottime() - begun <= LATE_SECONDS + LAG_SECONDS
            await probe
        except (DatabaseUnavailable, TimeoutError) as error:
            self._why = self._why or error_text(error)
            return False
        finally:
            probe.cancel()
            if before and self._late:
                self._jammed.set()
        return True

    async def _probe(self) -> None:
        """Say something to this node, and hear it.

        Raises:
            DatabaseUnavailable: it could not be said within the deadline.
            TimeoutError: it was not heard within the deadline.
        """
        self._echo.clear()
        self._expected = PROBE + self._ids.token()
        await self._ask("probe", self._own, self._expected)
        await self._in_time(self._echo.wait())

    async def _ask(self, name: str, *args: object) -> list[asyncpg.Record]:
        connection = self._connection
        if connection is None:
            raise DatabaseUnavailable("The line to PostgreSQL is down; it is being reopened.")
        try:
            query = statement(name, self._settings.schema_name)
            rows: list[asyncpg.Record] = await self._in_time(self._in_turn(lambda: connection.fetch(query, *args)))
        except ANSWERED as error:
            raise unavailable(self._settings.line_url, error) from error  # a line that is opened anew helps nobody
        except (*TROUBLE, asyncpg.PostgresError) as error:
            self._late = isinstance(error, TimeoutError)
            self._why = error_text(error)
            self._lost.set()
            message = f"The line to PostgreSQL did not answer ({error_text(error)})."
            raise DatabaseUnavailable(message) from error
        return rows

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with self._turn:
            return await work()

    async def _in_time(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await what takes no longer than the deadline.

        When the event loop itself stood meanwhile, what is awaited may lie in the socket: then it is looked once more.

        Raises:
            TimeoutError: it took longer.
        """
        deadline, begun = self._settings.deadline, self._clock.boottime()
        task = asyncio.create_task(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks one that was late
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline)
            if not done and self._clock.boottime() - begun > deadline + LAG_SECONDS:
                done, _ = await asyncio.wait({task}, timeout=deadline)
            if not done:
                message = f"no answer within {deadline:g} s"
                raise TimeoutError(message)
        finally:
            task.cancel()
        return task.result()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _on_lost(self, _connection: object) -> None:
        self._why = self._why or "the server has closed it"
        self._lost.set()

    def _on_notification(self, _connection: object, _pid: int, name: str, payload: object) -> None:
        if self._jammed.is_set():
            return  # a line that is about to go
        text, allowance = str(payload), self._allowances[name]
        if text and text == self._expected:
            self._echo.set()
        elif not allowance.take(text):
            self._on_reset(crashed=False)
            if allowance.flooded and name == self._everybodys:
                self._jammed.set()
        elif not text.startswith(PROBE):
            (self._on_payload if name == self._own else self._on_broadcast)(text)


def _set_up(connection: asyncpg.Connection) -> None:
    """Probe the peer: asyncpg sets no keepalive, and a half-open connection gives no other sign.

    What the kernel buffers is bounded: one turn of the event loop may read all of that.
    """
    transport: Any = getattr(connection, "_transport", None)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 12_000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
