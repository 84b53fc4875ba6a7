"""Steady work of clients while the database comes and goes; what really ran stands in a file outside of the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcp import types

from tests.harness.clients import connect
from tests.harness.cluster import tables_of
from tests.harness.processes import REPOSITORY
from tests.harness.waiting import eventually

TARGET = "tests/harness/deploys.py:mcp"
SETTLE = 30.0
FIGURES = REPOSITORY / ".cache/loss.json"


@dataclass
class Call:
    """One call: what was asked, when it began and ended, and what went wrong."""

    text: str
    began: float
    ended: float = 0.0
    failure: str = ""


@dataclass
class Client:
    """One official client, one session."""

    label: str
    url: str
    going: Callable[[], bool]
    long: float
    calls: list[Call] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    ended: bool = False

    async def run(self) -> None:
        """Work until there is to be no more, then wait for what is still to come."""
        async with connect(self.url, read_timeout_seconds=90, message_handler=self._hear) as client:

            async def loop(tool: str, pause: float, **more: object) -> None:
                for number in itertools.count():
                    if not self.going():
                        return
                    call = Call(f"{self.label}-{tool}-{number}", time.monotonic())
                    self.calls.append(call)
                    try:
                        result = await client.call_tool(tool, {"text": call.text, **more})
                        [content] = result.content
                        assert isinstance(content, types.TextContent), result
                        assert content.text == call.text, content.text
                    except Exception as error:  # noqa: BLE001 - whatever it is, it counts
                        call.failure = repr(error)
                    else:
                        if tool == "announce":
                            self.announced.append(f"test://{call.text}")
                    call.ended = time.monotonic()
                    await asyncio.sleep(pause)

            await asyncio.gather(
                loop("unsafe", 0.1), loop("unsafe_long", 0.1, seconds=self.long), loop("announce", 0.2)
            )
            with contextlib.suppress(AssertionError):
                await eventually(lambda: len(self.told) >= len(self.announced), "notifications", 5)
        self.ended = True

    async def _hear(self, message: object) -> None:
        if isinstance(message, types.ResourceUpdatedNotification):
            self.told.append(str(message.params.uri))


class Load:
    """Several clients at work, and what they saw."""

    def __init__(self, truth: Path) -> None:
        self.clients: list[Client] = []
        self.working = True
        self._truth = truth

    @property
    def calls(self) -> list[Call]:
        """Every call of every client."""
        return [call for client in self.clients for call in client.calls]

    @property
    def ended(self) -> bool:
        """Whether every client is done."""
        return all(client.ended for client in self.clients)

    @property
    def failures(self) -> list[str]:
        """What went wrong, by call."""
        return [f"{call.text}: {call.failure}" for call in self.calls if call.failure]

    @property
    def started(self) -> Counter[str]:
        """How often each call really began."""
        lines = map(json.loads, self._truth.read_text().splitlines())
        return Counter(text for kind, text, _ in lines if kind == "start")

    def served_after(self, moment: float) -> list[float]:
        """For each client, how long after a moment its first answer came."""
        return [
            min(call.ended for call in client.calls if call.ended > moment and not call.failure) - moment
            for client in self.clients
        ]

    async def all_served_since(self, moment: float, seconds: float = SETTLE) -> None:
        """Wait until every client has had an answer to each kind of call that began after a moment."""

        def served() -> bool:
            return all(
                any(call.began > moment and call.ended and f"-{tool}-" in call.text for call in client.calls)
                for client in self.clients
                for tool in ("unsafe", "unsafe_long", "announce")
            )

        await eventually(served, "every session is served", seconds)

    def check(self) -> None:
        """Nothing that was acknowledged is lost, and nothing ran twice."""
        started = self.started
        assert max(started.values()) == 1, started.most_common(5)
        good = {call.text for call in self.calls if not call.failure}
        assert good <= set(started), "each answer comes from a run"
        for client in self.clients:
            assert Counter(client.told) == Counter(client.announced), client.label


@contextlib.asynccontextmanager
async def load(urls: list[str], truth: Path, *, each: int = 1, long: float = 1.5) -> AsyncIterator[Load]:
    """Clients at work until the context ends, with an end to what they do."""
    made = Load(truth)
    for number, url in enumerate(urls * each):
        made.clients.append(Client(f"c{number}", url, lambda: made.working, long))
    async with asyncio.TaskGroup() as group:
        for client in made.clients:
            group.create_task(client.run())
        try:
            await eventually(
                lambda: all(any(call.ended for call in client.calls) for client in made.clients), "all work", 20
            )
            yield made
        finally:
            made.working = False


def rounded(values: list[float]) -> dict[str, Any]:
    """First and last of some times, for figures."""
    return {"first": round(min(values), 2), "last": round(max(values), 2)}


def note(what: str, figures: dict[str, Any]) -> None:
    """Add to the figures of this run."""
    FIGURES.parent.mkdir(exist_ok=True)
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps(known | {what: figures}, indent=1))


async def unmoved(url: str, sessions: int, nodes: int = 3) -> None:
    """Every session is where it was, and every node is alive under its own id."""
    async with tables_of(url) as tables:
        assert await tables.value("select count(*) from pgmcp.takeover_history") == 0
        assert await tables.value("select count(*) from pgmcp.sessions") == sessions
        assert await tables.value("select array_agg(state) from pgmcp.nodes") == ["ready"] * nodes
