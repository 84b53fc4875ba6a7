"""Streams that a living node has and nobody carries: letting go did not get through, or becoming the sink did too late.

Their sessions would count as used, and their streams as open, for as long as the node lives.
"""

from __future__ import annotations

import logging

from pgmcp.clock import Clock
from pgmcp.ports import Log
from pgmcp.types import Cursor, StreamId
from pgmcp.web.open_streams import OpenStreams

logger = logging.getLogger(__name__)


class AbandonedStreams:
    """Lets go of such streams.

    Args:
        after: seconds for which nobody has carried them; an exchange that has just become the sink begins within that.
    """

    def __init__(self, log: Log, open_streams: OpenStreams, clock: Clock, after: float) -> None:
        self._log, self._open_streams, self._clock, self._after = log, open_streams, clock, after
        self._since: dict[tuple[StreamId, int], float] = {}

    async def let_go(self) -> None:
        """Look once.

        Raises:
            DatabaseUnavailable: not now.
        """
        carried = await self._log.carried()
        now, before = self._clock.boottime(), self._since
        self._since = {key: before.get(key, now) for key in carried if not self._open_streams.hears(key[0])}
        for (stream, sink_epoch), since in self._since.items():
            if now - since >= self._after:
                logger.info("a stream is let go that nobody here carries any more")
                await self._log.release(Cursor(stream, sink_epoch, 0))
