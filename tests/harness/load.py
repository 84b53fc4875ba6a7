"""Steady work of official clients while nodes come and go, and what they saw of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mcp import types
from mcp.client.session import ClientRequestContext

from tests.harness.clients import RawSession, connect
from tests.harness.conformance import node_binary
from tests.harness.nginx import Nginx
from tests.harness.processes import REPOSITORY, ManagedProcess, NodeProcess
from tests.harness.waiting import eventually

TARGET = "tests/harness/deploys.py:mcp"
"""The server that the clients know; ``TRUTH`` names the file in which it notes each call."""

LOAD = REPOSITORY / "tests/harness/typescript/load.mjs"
PACKAGES = REPOSITORY / ".cache/typescript"


@dataclass
class Seen:
    """What a client called, with the seconds that it took; what it was told; what failed."""

    calls: list[tuple[str, str, float]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def texts(self, tool: str = "") -> list[str]:
        """The arguments of all calls of a tool, or of all tools."""
        return [text for name, text, _ in self.calls if tool in {"", name}]


class PythonClient:
    """The official Python client at steady work."""

    def __init__(self, url: str, label: str, going: Callable[[], bool], long: float) -> None:
        self.seen = Seen()
        self._url, self._label, self._going, self._long = url, label, going, long

    async def run(self) -> Seen:
        """Work until there is to be no more, then wait for what is still to come."""
        try:
            async with connect(
                self._url, read_timeout_seconds=60, elicitation_callback=self._accept, message_handler=self._hear
            ) as client:

                async def call(tool: str, text: str, **more: object) -> str:
                    result = await client.call_tool(tool, {"text": text, **more})
                    [content] = result.content
                    assert isinstance(content, types.TextContent), result
                    return "error" if result.is_error else content.text

                async def loop(tool: str, pause: float, expected: str = "{}", **more: object) -> None:
                    for number in itertools.count():
                        if not self._going():
                            return
                        text = f"{self._label}-{tool}-{number}"
                        start = time.monotonic()
                        try:
                            assert await call(tool, text, **more) == expected.format(text)
                            self.seen.calls.append((tool, text, time.monotonic() - start))
                        except Exception as error:  # noqa: BLE001 - whatever it is, it counts
                            self.seen.failures.append(f"{text}: {error!r}")
                        await asyncio.sleep(pause)

                await asyncio.gather(
                    loop("unsafe", 0.2),
                    loop("unsafe_long", 0.1, seconds=self._long),
                    loop("ask", 0.3, expected="{}: accept"),
                    loop("announce", 0.3),
                )
                with contextlib.suppress(AssertionError):
                    announced = len(self.seen.texts("announce"))
                    await eventually(lambda: len(self.seen.told) >= announced, "notifications")
        except Exception as error:  # noqa: BLE001 - whatever it is, it counts
            self.seen.failures.append(f"{self._label}: {error!r}")
        return self.seen

    async def _accept(self, context: ClientRequestContext, params: types.ElicitRequestParams) -> types.ElicitResult:
        del context, params
        await asyncio.sleep(0.2)
        return types.ElicitResult(action="accept", content={"ok": True})

    async def _hear(self, message: types.ServerNotification | Exception) -> None:
        if isinstance(message, types.ResourceUpdatedNotification):
            self.seen.told.append(str(message.params.uri))


async def newcomers(url: str, going: Callable[[], bool]) -> Seen:
    """Clients that come, call and go."""
    seen = Seen()
    for number in itertools.count():
        if not going():
            return seen
        text, start = f"newcomer-{number}", time.monotonic()
        try:
            async with connect(url, read_timeout_seconds=60) as client:
                result = await client.call_tool("unsafe", {"text": text})
                assert not result.is_error, result
            seen.calls.append(("newcomer", text, time.monotonic() - start))
        except Exception as error:  # noqa: BLE001 - whatever it is, it counts
            seen.failures.append(f"{text}: {error!r}")
        await asyncio.sleep(0.5)
    raise AssertionError


async def modern(url: str, going: Callable[[], bool], long: float) -> Seen:
    """A client without a session (2026-07-28): nothing of it can go on elsewhere."""
    seen = Seen()
    async with connect(url, mode="auto", read_timeout_seconds=60) as client:
        assert client.protocol_version == "2026-07-28"

        async def loop(tool: str, pause: float, **more: object) -> None:
            for number in itertools.count():
                if not going():
                    return
                text, start = f"modern-{tool}-{number}", time.monotonic()
                try:
                    result = await client.call_tool(tool, {"text": text, **more})
                    assert not result.is_error, result
                    seen.calls.append(("modern", text, time.monotonic() - start))
                except Exception as error:  # noqa: BLE001 - whatever it is, it counts
                    seen.failures.append(f"{text}: {error!r}")
                await asyncio.sleep(pause)

        await asyncio.gather(loop("unsafe", 0.2), loop("unsafe_long", 0.1, seconds=long))
    return seen


async def old_client(base: str, going: Callable[[], bool], long: float) -> Seen:
    """A client of 2025-03-26, whose exchanges cannot be resumed."""
    seen = Seen()
    async with RawSession(protocol_version="2025-03-26") as session:
        await session.open(base)
        for number in itertools.count():
            if not going():
                return seen
            text, start = f"old-{number}", time.monotonic()
            try:
                await session.call_tool(base, "unsafe", long + 30, text=text, seconds=long / 2)
                seen.calls.append(("old", text, time.monotonic() - start))
            except Exception as error:  # noqa: BLE001 - whatever it is, it counts
                seen.failures.append(f"{text}: {error!r}")
    raise AssertionError


@contextlib.asynccontextmanager
async def typescript(version: str, url: str, folder: Path, long: float) -> AsyncIterator[ManagedProcess]:
    """One of the official TypeScript clients at steady work."""
    node = node_binary()
    assert node is not None, "node 22 or newer is missing: `make test` installs it"
    script = PACKAGES / f"load-{os.getpid()}-{version}.mjs"  # packages are looked for beside the script
    script.write_bytes(LOAD.read_bytes())
    command = [node, str(script), version, url, f"ts-{version}", str(long)]
    process = ManagedProcess(command, log_path=folder / f"typescript-{version}.log")
    try:
        with process:
            await eventually(lambda: process.log.startswith("ready"), "the TypeScript client works", 20)
            yield process
    finally:
        script.unlink()


async def ended(process: ManagedProcess) -> Seen:
    """Ask a TypeScript client to finish; what it saw."""
    process.signal(signal.SIGTERM)
    await eventually(lambda: not process.running, "the TypeScript client ends", 90)
    assert process.returncode == 0, process.log
    return Seen(**json.loads(process.log.splitlines()[-1]))


class Rotation:
    """Restarts nodes one after the other."""

    def __init__(self, nginx: Nginx, limit: float) -> None:
        self.left: list[float] = []
        self._nginx, self._limit = nginx, limit
        self._back: list[tuple[NodeProcess, int]] = []

    async def restart(self, node: NodeProcess) -> None:
        """Restart a node: SIGTERM, its end with code 0, the start, and until it is ready.

        nginx gives no work for ten seconds to a node that refused a connection, and none to anybody when all have. So
        the last but one that was restarted must be at work again.
        """
        for other, since in self._back[-2:-1]:

            def works(port: int = other.port, since: int = since) -> bool:
                return any(exchange.ports[-1:] == (port,) for exchange in self._nginx.exchanges[since:])

            await eventually(works, f"nginx gives work to {other.name}", 30)
        start = time.monotonic()
        node.signal(signal.SIGTERM)
        await eventually(lambda: not node.running, f"{node.name} leaves", 0.5 + self._limit + 10)
        self.left.append(time.monotonic() - start)
        assert node.returncode == 0, node.log[-4000:]
        node.start()
        await eventually(lambda: node.running and node.is_ready(), f"{node.name} is back", 60)
        self._back.append((node, len(self._nginx.exchanges)))


class Load:
    """Every kind of client at work behind nginx, from ``async with`` until ``finish``.

    Args:
        long: seconds that long calls take.
        folder: for logs.
        each: how many of each kind of official client there are.
    """

    def __init__(self, nginx: Nginx, folder: Path, long: float, *, each: int = 2) -> None:
        self._nginx, self._folder, self._long, self._each = nginx, folder, long, each
        self._stack = contextlib.AsyncExitStack()
        self._working = True
        self._work: list[asyncio.Task[Seen]] = []
        self._scripts: list[ManagedProcess] = []
        self.saw: list[Seen] = []

    async def __aenter__(self) -> Self:
        url = self._nginx.mcp_url
        try:
            for version in ("v2", "v1")[: self._each]:
                script = typescript(version, url, self._folder, self._long)
                self._scripts.append(await self._stack.enter_async_context(script))
            clients = [PythonClient(url, f"python-{number}", self._going, self._long) for number in range(self._each)]
            runs = [client.run() for client in clients]
            runs += [newcomers(url, self._going), modern(url, self._going, self._long)]
            runs.append(old_client(self._nginx.url, self._going, self._long))
            self._work = [asyncio.create_task(run) for run in runs]
            await eventually(lambda: all(client.seen.texts("ask") for client in clients), "every client works", 20)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._working = False
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        await self._stack.aclose()

    async def finish(self) -> list[Seen]:
        """Let everybody finish what they do; what they saw."""
        self._working = False
        self.saw = [*await asyncio.gather(*self._work), *[await ended(script) for script in self._scripts]]
        return self.saw

    def _going(self) -> bool:
        return self._working


def figures_of(saw: list[Seen], nginx: Nginx) -> dict[str, Any]:
    """How much was called, how long it took at most, and what went wrong."""
    tools = sorted({name for seen in saw for name, _, _ in seen.calls})
    return {
        "calls": sum(len(seen.calls) for seen in saw),
        "notifications": sum(len(seen.told) for seen in saw),
        "longest": {
            tool: round(max(seconds for seen in saw for name, _, seconds in seen.calls if name == tool), 2)
            for tool in tools
        },
        "failures": [failure for seen in saw for failure in seen.failures],
        "refused": [str(exchange) for exchange in nginx.exchanges if exchange.status not in {200, 202, 204, 499}],
    }


def check(saw: list[Seen], figures: dict[str, Any], truth: Path) -> None:
    """No call failed, each ran once, nothing was refused, no notification was lost."""
    assert set(figures["longest"]) == {"announce", "ask", "modern", "newcomer", "old", "unsafe", "unsafe_long"}, figures
    assert not figures["failures"], figures
    assert not figures["refused"], figures
    for seen in saw:
        assert Counter(seen.told) == Counter(f"test://{text}" for text in seen.texts("announce"))
    started = Counter(text for kind, text, _ in map(json.loads, truth.read_text().splitlines()) if kind == "start")
    assert started == Counter(text for seen in saw for text in seen.texts()), "each call ran once"
