"""Closing a port under a stream of new connections: whoever came in is answered, whoever comes too late is refused."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
import uvloop

from pgmcp.node import listener

CLIENTS = 8


class Echo(asyncio.Protocol):
    """Answers each connection once, as an HTTP server does whose balancer keeps none."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)  # type: ignore[attr-defined]
        self.transport.close()


def call(port: int) -> str:
    """One connection; how it ended."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"x")
            return "answered" if connection.recv(1) == b"x" else "cut"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return repr(error)


def knock(port: int, outcomes: Counter[str]) -> None:
    """Come in again and again until the listener is closed."""
    outcome = "answered"
    while outcome == "answered":
        outcome = call(port)
        outcomes[outcome] += 1


async def closed_under_load() -> Counter[str]:
    """Close a port while clients come in and the loop is busy with other things; how the clients fared."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0)
    port, outcomes = server.sockets[0].getsockname()[1], Counter[str]()
    threads = [threading.Thread(target=knock, args=(port, outcomes)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()

    async def be_busy() -> None:
        while True:
            time.sleep(0.01)  # noqa: ASYNC251 - connections pile up in the kernel
            await asyncio.sleep(0)

    busy = asyncio.create_task(be_busy())
    async with asyncio.timeout(10):
        while outcomes["answered"] < 10 * CLIENTS:  # noqa: ASYNC110 - it changes in threads
            await asyncio.sleep(0.01)
    await listener.close([server])
    await asyncio.gather(*(asyncio.to_thread(thread.join, 10) for thread in threads))
    busy.cancel()
    return outcomes


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_nobody_who_came_in_is_turned_out(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        outcomes = runner.run(closed_under_load())
    assert set(outcomes) == {"answered", "refused"}, outcomes
    assert outcomes["refused"] == CLIENTS


async def test_where_the_kernel_has_no_such_filter_the_port_closes_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(_: socket.socket) -> None:
        raise OSError(92, "Protocol not available")

    monkeypatch.setattr(listener, "deafen", unknown)
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await listener.close([server])
    assert await asyncio.to_thread(call, port) == "refused"
