"""How an incarnation goes on when its database follows another timeline (see ``timeline`` of store and session).

Invariant: from the moment in which a connection finds another timeline until the node's sessions are brought in line
with it, no owner's write is sent.
"""

from __future__ import annotations

import asyncio
import logging

from pgmcp.clock import Clock
from pgmcp.cluster.lease import Lease
from pgmcp.cluster.publications import PublicationReader
from pgmcp.errors import Fenced, PgmcpError
from pgmcp.service import Service
from pgmcp.session.host import Host
from pgmcp.store.encryption.key_rings import KeyRing
from pgmcp.store.timeline import Timeline
from pgmcp.trouble import Trouble
from pgmcp.types import JUMP

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2
"""Seconds after which it is tried again."""

LOOK_SECONDS = 1.0
"""Seconds after which a writer that waits looks again."""


class TimelineChange(Service):
    """What holds an incarnation's writers while the term changes.

    Args:
        timeline: what the node's connections follow.
        lease: nobody writes without it anyway.
        box: the key ring, which may have lost keys.
    """

    def __init__(self, timeline: Timeline, lease: Lease, box: KeyRing, clock: Clock) -> None:
        self._timeline, self._lease, self._box, self._clock = timeline, lease, box, clock
        self._term = timeline.term
        self._changed, self._settled = asyncio.Event(), asyncio.Event()
        self._host: Host | None = None
        self._publication_reader: PublicationReader | None = None
        self._settled.set()
        self._trouble = Trouble("bringing sessions in line with the new primary", clock)

    async def acting(self) -> None:
        """Return when the node may act, in the present term.

        Raises:
            Fenced: it never may again.
        """
        await self._lease.acting()
        while not self._settled.is_set():
            await self._clock.wait(self._settled, LOOK_SECONDS)
            await self._lease.acting()

    def watch(self, host: Host, publication_reader: PublicationReader) -> None:
        """Begin to watch the timeline for the sessions of ``host``, and for the horizon of ``publication_reader``."""
        self._host, self._publication_reader = host, publication_reader
        self._timeline.on_change = self._on_change

    def _on_change(self) -> None:
        self._settled.clear()
        self._changed.set()
        if self._host is not None:
            self._host.unsettled = True
        if self._publication_reader is not None:
            self._publication_reader.look(gap=True)

    async def run(self) -> None:
        """Bring the sessions in line with each new term, for ever; ends when the node is fenced."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while not self._settled.is_set():
                try:
                    await self._go_on(self._timeline.term)
                except Fenced:
                    return
                except PgmcpError as error:
                    self._trouble.met(error)
                    await self._clock.sleep(RETRY_SECONDS)

    async def _go_on(self, term: int) -> None:
        await self._lease.acting()
        await self._box.load()
        if self._host is not None:
            await self._host.go_on((term - self._term) * JUMP, lambda: self._timeline.term == term)
        self._term = term
        self._trouble.over()
        self._settled.set()
        logger.warning("sessions go on with the new primary, in term %d", term)
