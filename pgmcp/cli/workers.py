"""``pgmcp serve --workers N``: several nodes of one machine on one port.

Invariants:
- Each worker is a node of its own, in a fresh process (spawned, never forked), named NAME-1 … NAME-N.
- The kernel spreads connections over them (SO_REUSEPORT); this process holds the port, so that it cannot be lost
  between two lives of a worker, and never accepts on it.
- Workers end with this process, however it dies.

Failure handling: a worker that dies is started again, after a pause that grows while it keeps dying. One that cannot
start at all (``HOPELESS``: a setting, the database, the schema, another server's cluster, the server's own lifespan)
ends the whole with its code, since every other one would do the same. SIGTERM, SIGINT and SIGHUP drain all of them
together; a second one ends them at once. A terminal's Ctrl-C is for this process only, which passes it on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pgmcp.cli.options import PGMCP
from pgmcp.cli.signals import ended_by
from pgmcp.clock import Clock
from pgmcp.embedded import bound_to_parent
from pgmcp.node import host_name, own_sockets, shared_socket
from pgmcp.settings import Settings

logger = logging.getLogger(__name__)

PAUSE_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
STEADY_SECONDS = 10.0
"""Seconds of life after which a worker's death counts as the first one again."""

HOPELESS = frozenset({2, 3, 4, 5, 6, 8})


class Workers:
    """The workers of one ``serve``.

    Args:
        command: starts a worker; its name and port are appended.
        environment: variables with what must not stand in a command line.
        name: their names begin with it.
        count: how many there are.
        port: the port that they share.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], name: str, count: int, port: int, clock: Clock
    ) -> None:
        self._command, self._environment = command, os.environ | environment
        self._name, self._count, self._port, self._clock = name, count, port, clock
        self._running: dict[int, Process] = {}
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """Keep the workers running until a signal; the exit code."""
        loop = asyncio.get_running_loop()
        for number in ended_by():
            loop.add_signal_handler(number, self._stop)
        await asyncio.gather(*(self._keep(number) for number in range(1, self._count + 1)))
        return self._code

    async def _keep(self, number: int) -> None:
        deaths = 0
        while not self._stopping.is_set():
            born = self._clock.boottime()
            code = await self._live(number)
            if self._stopping.is_set():
                return
            if code in HOPELESS and deaths == 0:
                self._code = code
                self._stop()
                return
            deaths = 0 if self._clock.boottime() - born > STEADY_SECONDS else deaths
            logger.warning("worker %s-%d ended with code %d and is started again", self._name, number, code)
            await self._clock.wait(self._stopping, PAUSE_SECONDS[min(deaths, len(PAUSE_SECONDS) - 1)])
            deaths += 1

    async def _live(self, number: int) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            "--node-name",
            f"{self._name}-{number}",
            "--port",
            str(self._port),
            env=self._environment,
            start_new_session=True,  # else a terminal's signal and ours are two, and a second one ends it at once
            preexec_fn=bound_to_parent(signal.SIGTERM),
        )
        self._running[number] = process
        if self._stopping.is_set():
            process.terminate()
        try:
            return await process.wait()
        finally:
            del self._running[number]

    def _stop(self) -> None:
        how = signal.SIGKILL if self._stopping.is_set() else signal.SIGTERM
        self._stopping.set()
        for process in self._running.values():
            with suppress(ProcessLookupError):
                process.send_signal(how)


def supervise(settings: Settings, arguments: Sequence[str], environment: Mapping[str, str], count: int) -> int:
    """Run ``count`` workers on one port until a signal.

    Args:
        settings: where they listen and what they are called.
        arguments: of ``pgmcp serve`` for each worker.
        environment: variables for each worker.

    Returns:
        the exit code: 0 after an orderly stop, else that of the worker that could not start.

    Raises:
        PortTaken: somebody listens on the port, also who would share it: another server's workers.
        SettingsError: there is no such address here.
    """
    if settings.port:
        for alone in own_sockets(settings):
            alone.close()
    with shared_socket(settings) as held:
        port = held.getsockname()[1]
        command = [*PGMCP, "serve", *arguments, "--shared-port"]
        logger.info("%d workers on http://%s:%d", count, settings.host, port)
        return asyncio.run(Workers(command, environment, settings.node_name or host_name(), count, port, Clock()).run())
