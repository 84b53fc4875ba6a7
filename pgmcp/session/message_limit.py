"""How large a message of the server may be.

A message beyond the limit is never stored: its client gets an error instead of an answer; whatever else the server's
code sends is refused where it is sent, and the code gets the error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pgmcp.errors import MessageTooLarge
from pgmcp.protocol import INTERNAL_ERROR, error_of
from pgmcp.session.adapter import Kind, Outgoing
from pgmcp.session.server_requests import dump

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MessageLimit:
    """The limit; ``max_bytes`` of one message."""

    max_bytes: int

    def fitting(self, outgoing: Outgoing) -> Outgoing:
        """A message that may be sent: the given one, or an error in place of an answer that is too large.

        Raises:
            MessageTooLarge: it is too large and no answer.
        """
        size = len(outgoing.message)
        if size <= self.max_bytes:
            return outgoing
        what = "answer" if outgoing.kind in {Kind.RESULT, Kind.ERROR} else outgoing.method
        text = f"The server's {what} has {size} bytes, of {self.max_bytes} that a message may have (--max-message)."
        logger.warning("a message of the server is too large: %s Nothing of it is stored or sent", text)
        if outgoing.rpc_id is None or outgoing.kind not in {Kind.RESULT, Kind.ERROR}:
            raise MessageTooLarge(text)
        data = {"reason": "too_large", "bytes": size, "limit": self.max_bytes}
        answer = dump(error_of(outgoing.rpc_id, INTERNAL_ERROR, f"{text} Ask for less at a time.", data))
        return Outgoing(Kind.ERROR, answer, outgoing.rpc_id, None, outgoing.related)
