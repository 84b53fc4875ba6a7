"""The load of a history: clients add to durable numbers of their sessions, over any node, and go on when one goes."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from tests.chaos.judge import Call
from tests.harness.clients import CONNECT, Message, RawExchange, RawSession
from tests.harness.processes import NodeProcess

PATIENCE = (2.0, 5.0, 30.0)
"""Seconds without a word after which a client hangs up and resumes on another node. A POST is repeated only when its
connection has broken, or after a 503: one that still waits somewhere would be another request when it gets through."""

PAUSE = 0.05
"""Seconds between two calls of a client at most, and between two tries."""


class Fault(Exception):
    """What no client may see."""


class Balancer:
    """Sends each exchange to the less busy of two nodes; it knows which processes live, and no more.

    Args:
        nodes: those that live now.
    """

    def __init__(self, nodes: Callable[[], Sequence[NodeProcess]]) -> None:
        self._nodes = nodes
        self._busy: Counter[str] = Counter()

    @contextmanager
    def node(self, draw: random.Random) -> Iterator[str]:
        """Where to send an exchange, for as long as it lasts."""
        url = min((node.url for node in draw.choices(self._nodes(), k=2)), key=self._busy.__getitem__)
        self._busy[url] += 1
        try:
            yield url
        finally:
            self._busy[url] -= 1


class Client:
    """One of a session's clients.

    Args:
        name: begins its request ids.
        seed: of all that is left to chance.
    """

    def __init__(self, name: str, session_id: str, balancer: Balancer, seed: str) -> None:
        self.history: list[Call] = []
        self._name, self._balancer, self._draw = name, balancer, random.Random(seed)
        self._session = RawSession()
        self._session.session_id = session_id
        self._count = itertools.count(1)
        self._tries = 0

    async def run(self, over: asyncio.Event) -> None:
        """Call until it is over, or something is wrong."""
        while not over.is_set() and not (self.history and self.history[-1].fault):
            await self.bump()
            await asyncio.sleep(self._draw.uniform(0, PAUSE))

    async def bump(self) -> None:
        """Call once, and note what the client is told in the end."""
        name, loop = f"{self._name}-{next(self._count)}", asyncio.get_running_loop()
        began, told, fault, self._tries = loop.time(), None, "", 0
        try:
            told = _told(await self._answer(name))
        except Fault as seen:
            fault = str(seen)
        except asyncio.CancelledError:
            fault = "no end"
            raise
        finally:
            session = str(self._session.session_id)
            self.history.append(Call(session, name, began, loop.time(), told, fault, self._tries))

    async def close(self) -> None:
        """Hang up."""
        await self._session.close()

    async def _answer(self, name: str) -> Message:
        params = {"name": "bump", "arguments": {}}
        body = {"jsonrpc": "2.0", "id": name, "method": "tools/call", "params": params}
        patience, last = self._draw.choice(PATIENCE), None
        while True:
            self._tries += 1
            try:
                with self._balancer.node(self._draw) as url:
                    # not by a cancel: one that comes just when the connection is made would leave that open
                    self._session.http.timeout = httpx.Timeout(10, read=patience if last else None, connect=CONNECT)
                    sent = self._session.get(url, last) if last else self._session.post(url, body)
                    async with await sent as exchange:
                        if (answer := await self._read(exchange, name, patience)) is not None:
                            return answer
                        last = exchange.last_event_id or last
            except httpx.HTTPError:
                pass
            await asyncio.sleep(self._draw.uniform(0, PAUSE))

    async def _read(self, exchange: RawExchange, name: str, patience: float) -> Message | None:
        """The answer; None if it is to be asked for again."""
        if exchange.status == 503:
            return None
        if not exchange.is_stream:
            message = f"{exchange.status} {exchange.body[:200]!r}"
            raise Fault(message)
        try:
            while (event := await exchange.next(patience)) is not None:
                if (said := event.message) is not None and said.get("id") == name:
                    return said
        except TimeoutError:
            pass
        return None


def _told(answer: dict[str, Any]) -> int | None:
    """What a bump tells; None if nobody knows whether it has run."""
    if "result" not in answer:
        if answer["error"].get("data", {}).get("outcome") == "unknown":
            return None
        raise Fault(str(answer["error"]))
    if answer["result"].get("isError"):
        return None  # the tool did not hear whether its number was stored
    return int(answer["result"]["content"][0]["text"])
