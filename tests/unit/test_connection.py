"""Deadlines of what is sent: a client that takes nothing is dropped, one that takes little is not."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from pgmcp.web.connection import PIECE_BYTES, Connection
from tests.harness.waiting import eventually

PATIENCE = 0.2


class Transport:
    """A transport whose buffer a test fills and empties."""

    def __init__(self) -> None:
        self.buffered = 0
        self.aborted = False
        self.cycle: object = None

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def get_extra_info(self, name: str) -> None:
        return None

    def get_protocol(self) -> Transport:
        return self

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted


class Cycle:
    """An exchange of uvicorn's, whose client takes what a test lets it take."""

    def __init__(self, transport: Transport | None) -> None:
        if transport is not None:
            self.transport = transport
            transport.cycle = self
        self.writable = asyncio.Event()
        self.sent: list[MutableMapping[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        await self.writable.wait()
        self.sent.append(message)


def body(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def untaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not been taken is what the transport holds: it has no socket."""
    monkeypatch.setattr(Connection, "untaken", property(lambda self: self._buffered))


@pytest.mark.parametrize("transport", [True, False], ids=["uvicorn", "another server"])
async def test_a_client_that_takes_nothing_is_dropped(transport: bool) -> None:
    cycle = Cycle(Transport() if transport else None)
    connection = Connection(cycle.receive, cycle.send, PATIENCE)
    async with asyncio.timeout(PATIENCE + 5):
        await connection.send(body(b"x"))
        assert connection.gone
        await connection.send(body(b"y"))
    assert cycle.sent == []
    if transport:
        assert cycle.transport.aborted


async def test_a_client_that_takes_a_little_now_and_then_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    untaken(monkeypatch)
    transport = Transport()
    cycle = Cycle(transport)
    transport.buffered = 10
    connection = Connection(cycle.receive, cycle.send, PATIENCE)
    sending = asyncio.create_task(connection.send(body(b"x", more=True)))
    loop = asyncio.get_running_loop()
    start = loop.time()
    while loop.time() < start + 3 * PATIENCE:
        await asyncio.sleep(PATIENCE / 4)
        transport.buffered = transport.buffered - 1 or 10**6  # a piece that was taken makes room for another one
    assert not sending.done()
    assert not connection.gone
    cycle.writable.set()
    await sending
    assert cycle.sent == [body(b"x", more=True)]


async def test_a_large_body_goes_out_in_pieces() -> None:
    cycle = Cycle(Transport())
    cycle.writable.set()
    connection = Connection(cycle.receive, cycle.send, PATIENCE)
    for size in (0, 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 5 * PIECE_BYTES + 7):
        for more in (True, False):
            cycle.sent.clear()
            await connection.send(body(b"z" * size, more=more))
            assert b"".join(message["body"] for message in cycle.sent) == b"z" * size
            assert all(len(message["body"]) <= PIECE_BYTES for message in cycle.sent)
            assert [message["more_body"] for message in cycle.sent] == [True] * (len(cycle.sent) - 1) + [more]


async def test_what_is_left_in_the_buffer_has_a_deadline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    untaken(monkeypatch)
    transport = Transport()
    cycle = Cycle(transport)
    cycle.writable.set()
    connection = Connection(cycle.receive, cycle.send, PATIENCE)
    transport.buffered = 5
    await connection.send(body(b"x"))
    assert not transport.aborted
    await eventually(lambda: transport.aborted, "the client is dropped", PATIENCE + 5)


@pytest.mark.parametrize("why", ["taken", "another exchange"])
async def test_an_exchange_that_is_over_drops_nobody(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    untaken(monkeypatch)
    transport = Transport()
    cycle = Cycle(transport)
    cycle.writable.set()
    connection = Connection(cycle.receive, cycle.send, PATIENCE)
    transport.buffered = 5
    await connection.send(body(b"x"))
    if why == "taken":
        transport.buffered = 0
    else:
        transport.cycle = object()
    await asyncio.sleep(2 * PATIENCE)
    assert not transport.aborted
