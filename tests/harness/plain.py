"""The everything example on the SDK's own server, without pgmcp: the control of the conformance tests.

``python -m tests.harness.plain --port PORT``. The SDK offers resumable streams (and so ``test_reconnection``) only with
an event store; this one keeps every event in memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import uvicorn
from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp.types import JSONRPCMessage

from examples.everything import mcp
from tests.harness.processes import ServerProcess


class _Event(NamedTuple):
    stream: StreamId
    message: JSONRPCMessage | None


class MemoryEventStore(EventStore):
    """Events of all streams in the order in which they came; the id is the position."""

    def __init__(self) -> None:
        self._events: list[_Event] = []

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        self._events.append(_Event(stream_id, message))
        return str(len(self._events) - 1)

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        last = int(last_event_id) if last_event_id.isdecimal() else len(self._events)
        if last >= len(self._events):
            return None
        stream = self._events[last].stream
        for position, event in enumerate(self._events[last + 1 :], start=last + 1):
            if event.stream == stream and event.message is not None:
                await send_callback(EventMessage(event.message, str(position)))
        return stream


class PlainProcess(ServerProcess):
    """The everything example as one process of the SDK."""

    def __init__(self, *, port: int, log_dir: Path) -> None:
        super().__init__(
            [sys.executable, "-m", "tests.harness.plain", "--port", str(port)],
            port=port,
            log_path=log_dir / f"plain-{port}.log",
        )


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    # h11, because httptools leaves blanks at the end of header values, which 2026-07-28 forbids to compare.
    uvicorn.run(
        mcp.streamable_http_app(event_store=MemoryEventStore(), retry_interval=500),
        host="127.0.0.1",
        port=parser.parse_args().port,
        http="h11",
        log_level="warning",
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
