"""The scenes of ``pgmcp demo``.

Each compares what the official client got with what must have happened, and the first difference ends the story. Being
late is shown but no loss: a busy machine is slow.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mcp import Client, MCPError
from mcp_types import Implementation

from pgmcp.cli.demo_story import Finding, Lost, Story
from pgmcp.cli.local import LocalCluster, Node
from pgmcp.clock import Ids
from pgmcp.errors import PgmcpError
from pgmcp.store.commands import views

CALLS = 6
STEPS, STEP_SECONDS = 8, 0.4  # of the slow tool: how many, and seconds for each
STRIKE = 3  # the step after which its node is struck
CHARGING_SECONDS = 5.0  # seconds for which a charge goes on after the money was taken
WAIT_SECONDS = 60.0  # seconds after which the client gives up on a call
DETECTION_SECONDS, RESTORE_SECONDS = 1.8, 3.0  # seconds: a killed node is dead, and its session goes on (G4)
FROZEN_SECONDS = 2.0  # seconds beyond the lease


@dataclass
class Scenes:
    """The scenes, in their order.

    Args:
        cluster: running.
        database: its database.
        ledger: the file into which the served example writes each charge.
        story: is told everything.
    """

    cluster: LocalCluster
    database: str
    ledger: Path
    story: Story
    counted: int = 0
    name: str = field(default_factory=lambda: f"pgmcp-demo-{Ids().token()[:8]}")

    async def tell(self) -> int:
        """Play all scenes with one client.

        Returns:
            0 if nothing was lost.
        """
        self.story.say("ready: every node renews its lease in PostgreSQL and knows its peers from there")
        rows = await self._view("live_nodes")
        columns = ("node", "id", "listens on")
        self.story.table(columns, [(row["node_name"], row["node_id"], row["address"]) for row in rows])
        self.story.scene("A client, which knows only the entry port: every request goes to the next node")
        who = Implementation(name=self.name, version="1")
        try:
            async with Client(
                self.cluster.url, mode="legacy", client_info=who, read_timeout_seconds=WAIT_SECONDS, cache=None
            ) as client:
                await self._guarded(client)
        except (MCPError, OSError, TimeoutError, ExceptionGroup) as error:
            self.story.lost = self.story.lost or f"the client could not connect or leave: {error!r}"
        return 0 if self.story.lost is None else 1

    async def _guarded(self, client: Client) -> None:
        """Play, and note what was lost; the client's own clean-up must not see it."""
        try:
            await self._calls(client)
            await self._killed_in_a_safe_call(client)
            await self._killed_in_an_unsafe_call(client)
            await self._frozen(client)
            await self._audit()
            self.story.finished = True
        except Lost as error:
            self.story.lost = str(error)
        except (MCPError, PgmcpError, TimeoutError) as error:
            self.story.lost = f"unexpectedly the client got: {error!r}"

    async def _calls(self, client: Client) -> None:
        row = await self._session()
        self.story.say(f"connected: session {row['session_id']}, its owner is {row['node_name']}")
        before = self.cluster.entry.taken.copy()
        for _ in range(CALLS):
            answer = await self._count(client)
        spread = ", ".join(f"{name} {n}" for name, n in sorted((self.cluster.entry.taken - before).items()))
        self.story.say(f"{CALLS} calls of count; requests went to {spread}; it counted to {answer['memory']}")
        self.story.find(Finding(f"{CALLS} calls over several nodes", f"one session, counted to {answer['memory']}"))

    async def _killed_in_a_safe_call(self, client: Client) -> None:
        self.story.scene("kill -9 of the owner, in the middle of a slow call that only reads")
        owner = await self._owner()

        def strike() -> None:
            self.story.say(f"kill -9 {owner.name}, the owner", "red")
            owner.signal(signal.SIGKILL)

        pause = await self._survey(client, owner, strike)
        row = await self._session()
        answer = await self._count(client)
        self.story.say(f"{row['node_name']} owns the session now, epoch {row['epoch']}")
        self.story.say(
            f"the counter that the server kept goes on ({answer['kept']}), the one in its memory starts anew "
            f"({answer['memory']})"
        )
        promised = DETECTION_SECONDS + RESTORE_SECONDS + (STRIKE + 1) * STEP_SECONDS
        self.story.find(
            Finding("owner killed in a safe call", "a pause, then the rest and the result", pause, promised)
        )

    async def _killed_in_an_unsafe_call(self, client: Client) -> None:
        self.story.scene("kill -9 of the owner, in the middle of a call that takes money")
        owner, struck = await self._owner(), self.cluster.clock.boottime()

        async def strike(progress: float, total: float | None, message: str | None) -> None:
            nonlocal struck
            self.story.say("the money is taken: a line in a ledger outside of the cluster")
            self.story.say(f"kill -9 {owner.name}, the owner", "red")
            struck = self.cluster.clock.boottime()
            owner.signal(signal.SIGKILL)

        arguments = {"order": self.name, "seconds": CHARGING_SECONDS}
        try:
            await client.call_tool("charge", arguments, progress_callback=strike)
        except MCPError as error:
            waited = self.cluster.clock.boottime() - struck
            outcome_is_unknown(error)
            self.story.say(f"after {waited:.2f} s the client got: {error.error.message}")
            self.story.say(f"and for its program: {json.dumps(error.error.data)}")
        else:
            raise Lost("a charge whose node was killed was answered as if nothing had happened")
        charged_once(self.ledger, self.name)
        self.story.say("the ledger says that it ran once")
        await self._count(client)
        seen = "an error: the outcome is unknown; it ran once"
        self.story.find(Finding("owner killed in an unsafe call", seen, waited, DETECTION_SECONDS + RESTORE_SECONDS))

    async def _frozen(self, client: Client) -> None:
        self.story.scene("SIGSTOP of the owner, in the middle of a slow call, for longer than its lease")
        owner, ttl, clock = await self._owner(), self.cluster.settings.ttl, self.cluster.clock
        old, frozen = await self._session(), asyncio.Event()
        since = clock.boottime()

        def strike() -> None:
            nonlocal since
            self.story.say(
                f"kill -STOP {owner.name}, the owner: it keeps its sockets and its lease of {ttl:g} s", "red"
            )
            since = clock.boottime()
            owner.signal(signal.SIGSTOP)
            frozen.set()

        survey, freeze = (asyncio.ensure_future(each) for each in (self._survey(client, owner, strike), frozen.wait()))
        try:
            await asyncio.wait({survey, freeze}, return_when=asyncio.FIRST_COMPLETED)
            if survey.done():
                survey.result()
            async with within("the entry port skips the frozen node"):
                while owner.name not in self.cluster.entry.silent:
                    await clock.sleep(0.02)
            self.story.say("another call, which only the owner can answer")
            await self._count(client)
            waited = clock.boottime() - since
            self.story.say(f"answered {waited:.2f} s after the freeze")
            await survey
        finally:
            survey.cancel()
            freeze.cancel()
            await asyncio.wait({survey, freeze})
        new = await self._session()
        self.story.say(f"{new['node_name']} owns the session now, epoch {new['epoch']}")
        self.story.find(
            Finding("owner frozen in a safe call", "a pause until its lease was over", waited, ttl + FROZEN_SECONDS)
        )
        await self._thawed(client, owner, old, new)

    async def _thawed(self, client: Client, zombie: Node, old: dict[str, Any], new: dict[str, Any]) -> None:
        self.story.say(f"kill -CONT {zombie.name}: it still believes that it owns the session", "red")
        since = self.cluster.clock.boottime()
        zombie.signal(signal.SIGCONT)
        async with within(f"{zombie.name} joins again"):
            while not (fresh := await self._ids_of(zombie.name) - {old["node_id"]}):
                await self.cluster.clock.sleep(0.1)
        waited = self.cluster.clock.boottime() - since
        self.story.say(f"{zombie.name} joined again after {waited:.2f} s as a new node, {fresh.pop()}")
        now = await self._session()
        if (now["node_id"], now["epoch"]) != (new["node_id"], new["epoch"]):
            raise Lost(f"the thawed node moved the session: {now['node_name']}, epoch {now['epoch']}")
        answer = await self._count(client)
        self.story.say(f"it stored nothing: owner, epoch and counter ({answer['kept']}) are as they were left")
        self.story.find(Finding("the frozen node thawed", "nothing; it joined again as a new node"))

    async def _audit(self) -> None:
        self.story.scene("The audit, as the view pgmcp.takeover_history shows it")
        session = (await self._session())["session_id"]
        rows = [row for row in await self._view("takeover_history") if row["session_id"] == session]
        columns = ("at", "from_node", "to_node", "epoch", "reason")
        self.story.table(columns, [[row[name] for name in columns] for row in rows])
        steps = [(row["from_node"], row["to_node"]) for row in rows]
        if len(steps) < 3 or any(before[1] != after[0] for before, after in pairwise(steps)):
            raise Lost(f"the audit does not show three changes of owner in a row: {steps}")

    async def _survey(self, client: Client, owner: Node, strike: Callable[[], None]) -> float:
        """Call the slow tool and strike its node in the middle; the longest pause that the client saw, in seconds."""
        clock, reports, times = self.cluster.clock, list[float](), list[float]()

        async def step(progress: float, total: float | None, message: str | None) -> None:
            reports.append(progress)
            times.append(clock.boottime())
            self.story.say(f"progress {progress:g} of {total:g}")
            if progress == STRIKE:
                strike()

        arguments = {"steps": STEPS, "seconds": STEP_SECONDS}
        result = await client.call_tool("survey", arguments, progress_callback=step)
        times.append(clock.boottime())
        content = result.structured_content or {}
        only_forward(reports, STEPS)
        if result.is_error or content.get("steps") != STEPS or content.get("process") == owner.process.pid:
            raise Lost(f"the slow call was answered wrongly: {result}")
        pause = max(after - before for before, after in pairwise(times))
        self.story.say(f"the result is right; the longest pause was {pause:.2f} s")
        return pause

    async def _count(self, client: Client) -> dict[str, int]:
        """Call the counter; what is kept must grow by one with each call."""
        result = await client.call_tool("count")
        self.counted += 1
        answer: dict[str, int] = result.structured_content or {}
        if result.is_error or answer.get("kept") != self.counted:
            raise Lost(f"call {self.counted} of the counter was answered with {answer or result}")
        return answer

    async def _owner(self) -> Node:
        row = await self._session()
        return next(node for node in self.cluster.nodes if node.name == row["node_name"])

    async def _session(self) -> dict[str, Any]:
        rows = [row for row in await self._view("live_sessions") if row["client_name"] == self.name]
        if len(rows) != 1:
            raise Lost(f"the client has {len(rows)} sessions")
        return rows[0]

    async def _ids_of(self, name: str) -> set[object]:
        rows = await self._view("live_nodes")
        return {row["node_id"] for row in rows if row["node_name"] == name and row["state"] == "ready"}

    async def _view(self, name: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(views.fetch, self.database, self.cluster.settings.schema_name, name)


@asynccontextmanager
async def within(what: str) -> AsyncIterator[None]:
    """Bound a wait for the cluster.

    Raises:
        Lost: it took longer than a client waits.
    """
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            yield
    except TimeoutError:
        raise Lost(f"in vain for {WAIT_SECONDS:g} s: {what}") from None


def only_forward(reports: list[float], last: int) -> None:
    """Progress grows with each report and gets to its end.

    Raises:
        Lost: it did not.
    """
    if any(after <= before for before, after in pairwise(reports)) or reports[-1:] != [last]:
        raise Lost(f"progress did not go forward to its end: {reports}")


def outcome_is_unknown(error: MCPError) -> None:
    """An error says that nobody knows whether the call was done.

    Raises:
        Lost: it says something else.
    """
    data = error.error.data
    if not isinstance(data, dict) or data.get("outcome") != "unknown":
        raise Lost(f"the error does not say that the outcome is unknown: {error.error}")


def charged_once(ledger: Path, order: str) -> None:
    """The truth outside of the cluster has one line for an order.

    Raises:
        Lost: it has none, or more.
    """
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    if (times := sum(line["order"] == order for line in lines)) != 1:
        raise Lost(f"the ledger says that the charge ran {times} times")
