"""Nothing dies silently: each duty is broken once, is heard of, and is done again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from pgmcp.errors import DatabaseUnavailable
from pgmcp.node import incarnation as incarnation_module
from pgmcp.node import node as node_module
from pgmcp.node import supervisor
from pgmcp.node.incarnation import Incarnation
from pgmcp.session.running_requests import ActorEnd
from pgmcp.store.notifier import TableNotifier
from pgmcp.store.takeover import TableTakeovers
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, cluster, everything, tables_of
from tests.harness.waiting import eventually

SOON: dict[str, Any] = {"poll": 0.2, "idle_poll": 0.3, "renew": 0.2}


class Bug(KeyError):
    """What nobody expects."""


def breaks(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int = 1) -> None:
    """Let a function fail so often, and then be as it was."""
    real, left = getattr(owner, name), times

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise Bug(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


Breaks = Callable[[Any, str], None]


async def wakes(node: RunningNode) -> None:
    node.incarnation.wakeups.orphans()


async def turns(node: RunningNode) -> None:
    node.database.timeline.on_change()


async def loses_its_line(node: RunningNode) -> None:
    async with tables_of(node.database.settings.database_url) as tables:
        await tables.end_lines()


async def looks(node: RunningNode) -> None:
    node.incarnation.host.look()


async def reads_again(node: RunningNode) -> None:
    node.incarnation.catch_up.begin()


async def nothing(_: RunningNode) -> None:
    pass


DUTIES: dict[str, tuple[Callable[[Incarnation], Any], str, Callable[[RunningNode], Awaitable[None]]]] = {
    "the line": (lambda one: one.lease, "hurry", loses_its_line),
    "the lease": (lambda one: one.line, "renew", nothing),
    "the change of timeline": (lambda one: one.host, "go_on", turns),
    "the wake-ups": (lambda _: TableNotifier, "notify", wakes),
    "the host": (lambda one: one.inbox, "unclaimed", looks),
    "the look for messages": (lambda one: one.inbox, "unclaimed", nothing),
    "the takeover": (lambda _: TableTakeovers, "take_orphans", nothing),
    "the survey": (lambda one: one.inbox, "owned", nothing),
    "the look at streams": (lambda one: one.log, "carried", nothing),
    "the retention": (lambda one: one.retention, "expire", nothing),
    "the catch-up": (lambda one: one.host, "drop_strangers", reads_again),
    "the look at the schema": (lambda _: incarnation_module, "outgrown", nothing),
}


LOOKERS = {"the host", "the look for messages"}
"""Both look for messages: whichever comes first meets what was broken."""


async def alive(node: RunningNode) -> int:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        return (await client.get(f"{node.url}/livez")).status_code


async def ready(node: RunningNode) -> bool:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        return (await client.get(f"{node.url}/readyz")).status_code == 200


@pytest.mark.parametrize("duty", DUTIES)
async def test_a_duty_that_fails_begins_anew(
    database: str, duty: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(incarnation_module, "EVERY_SECONDS", 0.3)
    async with cluster(database, everything, 1, **SOON) as (node,), RawSession() as session:
        await session.open(node.url)
        before, faults = node.incarnation, node.node.faults
        owner, name, provoke = DUTIES[duty]
        breaks(monkeypatch, owner(before), name)
        await provoke(node)
        await eventually(lambda: faults.counts, "it is counted")
        where = next(iter(faults.counts)) if duty in LOOKERS else duty
        assert where == duty or where in LOOKERS
        assert faults.counts == {where: 1}
        assert f"{where} failed" in caplog.text
        assert "Bug" in caplog.text, "with its trace"
        await eventually(lambda: node.present not in {None, before}, "the node joins again")
        assert (before.host.sessions, len(before.open_streams), before.line.up) == (0, 0, False)
        assert (await session.call_tool(node.url, "count"))["structuredContent"] == {"result": 1}, "the session goes on"
        assert await ready(node)
        assert await alive(node) == 200
        assert faults.counts == {where: 1}


async def test_its_sessions_go_to_other_nodes_at_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says that the node left: nobody waits for a lease to run out."""
    async with (
        cluster(database, everything, 2, **SOON) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        slow = {"name": "slow", "arguments": {"seconds": 30, "steps": 1000}, "_meta": {"progressToken": 1}}
        call = await session.request(nodes[1].url, "tools/call", slow, request_id=7)
        await call.message("notifications/progress")
        broken = nodes[0].incarnation
        monkeypatch.setattr(supervisor.Supervisor, "start", _never)
        breaks(monkeypatch, broken.inbox, "owned")
        answer = await call.response(7, timeout=5)
        assert "nobody knows" in answer["error"]["message"], "and not what a dying actor says by itself"
        assert await tables.value("select state from pgmcp.nodes where node_id = $1", broken.node_id) == "left"
        monkeypatch.undo()


async def _never(_: object) -> None:
    message = "not now"
    raise DatabaseUnavailable(message)


async def test_an_end_that_nobody_asked_for_is_a_fault(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(database, everything, 1, **SOON) as (node,):
        before = node.incarnation

        async def cancelled() -> set[Any]:
            raise asyncio.CancelledError

        before.inbox.owned = cancelled  # type: ignore[method-assign]  # as if it were its own end
        await eventually(lambda: node.node.faults.counts == {"the survey": 1}, "it is counted")
        await eventually(lambda: node.present not in {None, before}, "the node joins again")
        assert "CancelledError" in caplog.text


NODE = {"the look for commands": ("own_state", incarnation_module), "the look for keys": ("load", None)}


@pytest.mark.parametrize("duty", NODE)
async def test_a_duty_of_the_node_goes_on(
    database: str, duty: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_module, "REFRESH_SECONDS", 0.3)
    async with cluster(database, everything, 1, **SOON) as (node,):
        before, faults = node.incarnation, node.node.faults
        name, owner = NODE[duty]
        asked: list[bool] = []
        where: Any = owner or node.node.box
        real: Callable[..., Awaitable[Any]] = getattr(where, name)

        async def sometimes(*args: Any) -> Any:
            asked.append(True)
            if len(asked) == 1:
                raise Bug(name)
            return await real(*args)

        monkeypatch.setattr(where, name, sometimes)
        await eventually(lambda: len(asked) > 1, "it is done again")
        assert faults.counts == {duty: 1}
        assert "Bug" in caplog.text
        assert node.incarnation is before


async def test_several_failures_in_a_row_ask_for_a_new_process(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "REJOIN_SECONDS", 0.05)
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 2.0)
    async with cluster(database, everything, 1, **SOON) as (node,):
        breaks(monkeypatch, incarnation_module, "outgrown", supervisor.SEVERAL)
        await eventually(node.node.failing, "it says so", 20)
        assert await alive(node) == 503
        assert node.node.faults.counts == {"the look at the schema": supervisor.SEVERAL}
        await eventually(lambda: not node.node.failing(), "an incarnation that lives on is a good sign")
        assert await alive(node) == 200


@pytest.mark.parametrize("trouble", ["dead", "away", "draining"])
async def test_what_is_no_fault_is_not_counted(database: str, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "REJOIN_SECONDS", 0.05)
    async with cluster(database, everything, 1, **SOON) as (node,), tables_of(database) as tables:
        if trouble == "draining":
            await node.leave()
        else:
            tries = 0

            async def away(_: object) -> None:
                nonlocal tries
                tries += 1
                raise DatabaseUnavailable("away")

            if trouble == "away":
                monkeypatch.setattr(Incarnation, "start", away)
            before = node.incarnation
            await tables.execute("update pgmcp.nodes set state = 'dead'")
            if trouble == "away":
                await eventually(lambda: tries > 5, "it tries")
                monkeypatch.undo()
            await eventually(lambda: node.present not in {None, before}, "the node joins again")
        assert not node.node.faults.counts
        assert not node.node.failing()


async def test_work_for_one_session_that_fails_costs_no_other(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(database, everything, 1, **SOON) as (node,), RawSession() as session, RawSession() as other:
        await session.open(node.url)
        await other.open(node.url)
        before = node.incarnation
        breaks(monkeypatch, before.inbox, "end_owned")
        actors = before.host.actors
        before.host.over(actors[min(actors)], ActorEnd.ENDED)
        await eventually(lambda: node.node.faults.counts == {"work for one session": 1}, "it is counted")
        assert "Bug" in caplog.text
        assert (await other.call_tool(node.url, "count"))["structuredContent"] == {"result": 1}
        assert node.incarnation is before
        assert (await session.call_tool(node.url, "count"))["structuredContent"] == {"result": 1}, "it is found again"
