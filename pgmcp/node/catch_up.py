"""Catching up on wake-ups that may have been lost: after the line was lost, while it is down, and when told so.

Invariants:
- It costs statements by what has moved, not by what lives here: one for the inboxes of all sessions, one for the
  sessions that are over, one for publications, and the grouped reads of the streams that are open.
- The streams are read ``STREAMS_TOGETHER`` at a time, spread over ``SPREAD_SECONDS``: a node that was behind is not
  given all of it at once, and nodes whose lines were lost together do not ask together.
- However often it is wanted, it takes a bounded share of the node's time (``OnDemand``).
- A node that is deaf looks several times a second for what somebody is likely to wait for: two statements, whatever
  lives here. A call over another node takes as long as two such looks then.

Failure handling: what cannot be asked now is asked by the next poll, or by the next reading, which comes every two
seconds while the line is down.
"""

from __future__ import annotations

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.publications import PublicationReader
from pgmcp.cluster.takeover import Takeover
from pgmcp.errors import PgmcpError
from pgmcp.service import OnDemand, Service
from pgmcp.session.host import Host
from pgmcp.trouble import Trouble
from pgmcp.web.open_streams import OpenStreams

STREAMS_TOGETHER = 100
"""Streams that are read together."""

HURRY_SECONDS = 0.1
"""Seconds between two looks of a deaf node for what somebody is likely to wait for, at most."""

LATER_SECONDS = 2.0
"""Seconds for which it does not, when it could not."""

SPREAD_SECONDS = 1.0
"""Seconds over which the reads of many streams are spread, at most."""


class CatchUp(Service):
    """One incarnation's way to make up for lost wake-ups."""

    def __init__(
        self,
        host: Host,
        open_streams: OpenStreams,
        publication_reader: PublicationReader,
        takeover: Takeover,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._host, self._open_streams, self._publication_reader, self._takeover = (
            host,
            open_streams,
            publication_reader,
            takeover,
        )
        self._clock, self._ids = clock, ids
        self._looks = OnDemand(self._read, clock)
        self._trouble = Trouble("looking for sessions that are over", clock)
        self._not_before = float("-inf")

    @property
    def wanted(self) -> bool:
        """Whether a reading has still to begin."""
        return self._looks.wanted

    def begin(self) -> None:
        """Read again soon; once more if that is being done."""
        self._looks.want()

    async def run(self) -> None:
        """Read again whenever that is wanted, for ever."""
        await self._looks.run()

    async def hurry(self) -> None:
        """Look for messages, and for events of the newest streams: what is under way, if not too much is.

        Raises:
            DatabaseUnavailable: not now, and not for a while.
        """
        now = self._clock.boottime()
        if now < self._not_before:
            return
        for open_stream in self._open_streams.newest(STREAMS_TOGETHER):
            open_stream.moved.set()
        try:
            await self._host.poll()
        except PgmcpError:
            self._not_before = now + LATER_SECONDS
            raise

    async def _read(self) -> None:
        self._publication_reader.look()
        self._takeover.orphaned()
        self._host.look()
        try:
            await self._host.drop_strangers()
            self._trouble.over()
        except PgmcpError as error:
            self._trouble.met(error)
        await self._wake_streams()

    async def _wake_streams(self) -> None:
        open_streams = list(self._open_streams)
        groups = [
            open_streams[start : start + STREAMS_TOGETHER] for start in range(0, len(open_streams), STREAMS_TOGETHER)
        ]
        for number, group in enumerate(groups):
            if number:
                await self._clock.sleep(self._ids.jitter(SPREAD_SECONDS / len(groups)))
            for open_stream in group:
                open_stream.moved.set()
