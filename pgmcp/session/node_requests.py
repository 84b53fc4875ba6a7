"""What the node itself asks a server session: the replay of what its client had said, and which tools are harmless.

Invariant: the ids of these requests are random and are forgotten with their answers, so no id that a client chooses can
be taken for one of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from pgmcp.clock import Ids
from pgmcp.errors import PgmcpError
from pgmcp.session.adapter import Incoming
from pgmcp.session.server_requests import dump

ANSWER_SECONDS = 5.0
"""Seconds that a server session may take to answer the node itself."""


class NodeRequests:
    """The unanswered requests of the node itself to one server session.

    Args:
        ids: chooses their ids.
        tell: hands a message to the server session.
    """

    def __init__(self, ids: Ids, tell: Callable[[Incoming], None]) -> None:
        self._ids, self._tell = ids, tell
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request; its answer.

        Raises:
            TimeoutError: it took longer than ``ANSWER_SECONDS``.
        """
        rpc_id = f"pgmcp-{self._ids.token()}"
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[json.dumps(rpc_id)] = answer
        self._tell(Incoming(dump(request | {"id": rpc_id}), can_ask=False))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        finally:
            self._waiting.pop(json.dumps(rpc_id), None)

    def take(self, rpc_id: str, message: bytes) -> bool:
        """Take an answer, if it is to one of these."""
        answer = self._waiting.pop(rpc_id, None)
        if answer is not None and not answer.done():
            answer.set_result(json.loads(message))
        return answer is not None

    def fail(self) -> None:
        """End them all: the server session is over."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(PgmcpError("The server session ended before it answered the node"))
