"""The server that the simulated nodes serve: tools that take their time, and note that they run."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from pgmcp.clock import Clock
from pgmcp.errors import PgmcpError
from pgmcp.session.adapter import Conversation, Incoming, Kind, Outgoing, Shared
from pgmcp.session.state import Hooks, SessionState

VERSION = "2025-11-25"
STEPS = 5
TOOLS = [{"name": "safe", "annotations": {"idempotentHint": True}}, {"name": "unsafe"}]


class Tools:
    """An adapter to a server without an SDK.

    Args:
        clock: the node's time.
        taken: called when a message of a client reaches the server.
        ran: called with its id when a tool begins to run.
        adds: called when one begins to add to the session's sum; called back when the sum is stored.
    """

    def __init__(
        self,
        clock: Clock,
        taken: Callable[[], None],
        ran: Callable[[str], None],
        adds: Callable[[str], Callable[[int], None]],
    ) -> None:
        self.hooks, self._adds = Hooks(), adds
        self._adding: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._clock, self._taken, self._ran = clock, taken, ran

    def lifespan(self, shared: Shared) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError  # nobody asks without a session here

    def end_streams(self) -> None:
        pass

    def describe(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    async def converse(self, session_id: str, conversation: Conversation) -> None:
        """Run one session until it is stopped; like the SDK it then answers what is open with errors of its own."""
        calls: dict[str, asyncio.Task[None]] = {}
        try:
            while (incoming := await conversation.receive()) is not None:
                if incoming.context is not None:
                    self._taken()
                await self._handle(conversation, incoming, calls)
        finally:
            for rpc_id, call in calls.items():
                if not call.done():
                    call.cancel()
                    await conversation.emit(Outgoing(Kind.ERROR, _error(json.loads(rpc_id), "stopped"), rpc_id))

    async def _handle(
        self, conversation: Conversation, incoming: Incoming, calls: dict[str, asyncio.Task[None]]
    ) -> None:
        message = json.loads(incoming.body)
        rpc_id = json.dumps(message.get("id"))
        match message["method"]:
            case "initialize":
                server = {"name": "tools", "version": "1"}
                result = {"protocolVersion": VERSION, "capabilities": {"tools": {}}, "serverInfo": server}
                await self._answer(conversation, rpc_id, result)
            case "tools/list":
                await self._answer(conversation, rpc_id, {"tools": TOOLS})
            case "tools/call":
                calls[rpc_id] = asyncio.create_task(self._call(conversation, message, rpc_id))
            case "notifications/cancelled":
                asked = message["params"]["requestId"]
                call = calls.get(json.dumps(asked))
                if call is not None and not call.done():
                    call.cancel()
                    await asyncio.wait({call})
                    await conversation.emit(Outgoing(Kind.ERROR, _error(asked, "cancelled"), json.dumps(asked)))

    async def _call(self, conversation: Conversation, message: dict[str, Any], rpc_id: str) -> None:
        self._ran(rpc_id)
        seconds = message["params"]["arguments"]["seconds"]
        for step in range(1, STEPS):
            await self._clock.sleep(seconds / STEPS)
            said = {"progressToken": message["id"], "progress": step}
            note = json.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": said}).encode()
            await conversation.emit(Outgoing(Kind.NOTIFICATION, note, method="notifications/progress", related=rpc_id))
        await self._add(conversation.state, rpc_id)
        await self._clock.sleep(seconds / STEPS)
        await self._answer(conversation, rpc_id, {"content": []})

    async def _add(self, state: SessionState, rpc_id: str) -> None:
        async with self._adding[state.session_id]:
            stored = self._adds(rpc_id)
            told = await state.get("sum", 0) + 1
            with suppress(PgmcpError):  # it may be stored or not
                await state.set("sum", told)
                stored(told)

    async def _answer(self, conversation: Conversation, rpc_id: str, result: dict[str, Any]) -> None:
        text = json.dumps({"jsonrpc": "2.0", "id": json.loads(rpc_id), "result": result})
        await conversation.emit(Outgoing(Kind.RESULT, text.encode(), rpc_id))


def _error(rpc_id: object, text: str) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": rpc_id, "error": {"code": -32000, "message": text}}).encode()
