"""A session on a new owner: what is kept, what is compared, what its server can know."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import ToolAnnotations

from pgmcp import SessionState, keep_memory, session_state
from pgmcp.cluster.lease import LeaseState
from pgmcp.session.actor import Actor
from pgmcp.types import session_alias
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, Tables, cluster, everything, tables_of
from tests.harness.waiting import eventually

pytestmark = pytest.mark.filterwarnings("ignore::mcp.shared.exceptions.MCPDeprecationWarning")

WATCHED, UPDATED = "test://watched-resource", "notifications/resources/updated"


async def bury(tables: Tables, node: RunningNode) -> None:
    """Declare a node dead, as another would, and wait until it knows."""
    incarnation = node.incarnation
    await tables.execute("update pgmcp.nodes set state = 'dead' where node_id = $1", incarnation.node_id)
    await eventually(lambda: incarnation.lease.state is LeaseState.FENCED, "the node knows")


class Memory:
    """Servers that count in memory, and what was exported and restored."""

    def __init__(self, *, hooks: bool = True) -> None:
        self.exported: list[int] = []
        self.restored: list[Any] = []
        self._hooks = hooks

    def server(self, name: str = "memory") -> MCPServer:
        server, counts = MCPServer(name), dict[str, int]()

        @server.tool()
        async def count(ctx: Context) -> dict[str, Any]:
            """Count in memory and in what is kept."""
            state = session_state()
            counts[state.session_id] = counts.get(state.session_id, 0) + 1
            await state.set("count", await state.get("count", 0) + 1)
            assert ctx.request_context.request is not None
            return {"memory": counts[state.session_id], "kept": await state.get("count"), "restored": state.restored}

        async def export(state: SessionState) -> int:
            self.exported.append(counts[state.session_id])
            return counts[state.session_id]

        async def restore(state: SessionState, exported: Any) -> None:
            assert session_id(state) == state.session_id
            self.restored.append(exported)
            counts[state.session_id] = exported or 0

        if self._hooks:
            keep_memory(server, export=export, restore=restore)
        return server


def session_id(state: SessionState) -> str:
    assert state.restored
    return state.session_id


async def counted(session: RawSession, base: str) -> dict[str, Any]:
    return dict((await session.call_tool(base, "count"))["structuredContent"])


@contextlib.asynccontextmanager
async def two(
    database: str, served: Callable[[], object], **settings: Any
) -> AsyncIterator[tuple[list[RunningNode], Tables]]:
    async with cluster(database, served, 2, **settings) as nodes, tables_of(database) as tables:
        yield list(nodes), tables


async def test_what_is_kept_survives_a_death_and_what_is_remembered_does_not(database: str) -> None:
    memory = Memory()
    async with two(database, memory.server, renew=0.1) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        for turn in (1, 2):
            assert await counted(session, nodes[1].url) == {"memory": turn, "kept": turn, "restored": False}
        await bury(tables, nodes[0])
        assert await counted(session, nodes[1].url) == {"memory": 1, "kept": 3, "restored": True}
        assert memory.restored == [None]
        assert memory.exported == []
        (row,) = await tables.rows("select from_node, to_node, epoch, reason from pgmcp.takeover_history")
        assert tuple(row)[2:] == (2, "dead")


async def test_a_node_that_leaves_exports_what_its_server_remembers(database: str) -> None:
    memory = Memory()
    async with two(database, memory.server) as (nodes, _), RawSession() as session:
        await session.open(nodes[0].url)
        await counted(session, nodes[0].url)
        await nodes[0].leave()
        assert await counted(session, nodes[1].url) == {"memory": 2, "kept": 2, "restored": True}
    assert memory.restored == [1]


async def test_an_export_that_fails_costs_only_the_memory(database: str) -> None:
    def served() -> MCPServer:
        server = Memory(hooks=False).server()

        async def export(_: SessionState) -> object:
            return object()

        keep_memory(server, export=export)
        return server

    async with two(database, served) as (nodes, _), RawSession() as session:
        await session.open(nodes[0].url)
        await counted(session, nodes[0].url)
        await nodes[0].leave()
        assert await counted(session, nodes[1].url) == {"memory": 1, "kept": 2, "restored": True}


async def test_log_level_and_subscriptions_go_along(database: str) -> None:
    async with two(database, everything, renew=0.1) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        await session.call(nodes[0].url, "logging/setLevel", {"level": "error"})
        await session.call(nodes[0].url, "resources/subscribe", {"uri": WATCHED})
        await session.call(nodes[0].url, "resources/subscribe", {"uri": "test://other"})
        await session.call(nodes[0].url, "resources/unsubscribe", {"uri": "test://other"})
        standalone = await session.get(nodes[1].url)
        await bury(tables, nodes[0])
        await eventually(lambda: any(owned(node) for node in nodes), "a subscription is reason enough")
        await session.call_tool(nodes[1].url, "touch_watched_resource", text="x")
        await standalone.message(UPDATED)
        call = await session.request(nodes[1].url, "tools/call", {"name": "test_tool_with_logging"}, request_id=9)
        assert "result" in await call.response(9)
        assert [m for m in call.messages if m.get("method") == "notifications/message"] == [], "below the level"


def owned(node: RunningNode) -> int:
    return node.present.host.sessions if node.present else 0


async def test_a_new_build_with_another_name_goes_on(database: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pgmcp")
    names = iter(["one", "two"])
    memory = Memory(hooks=False)
    served = lambda: memory.server(next(names))  # noqa: E731
    async with two(database, served, cluster="counters") as (nodes, _), RawSession() as session:
        await session.open(nodes[0].url)
        await nodes[0].leave()
        assert (await counted(session, nodes[1].url))["restored"]
    [changed] = [record for record in caplog.records if "goes on with another serverInfo" in record.getMessage()]
    assert changed.levelname == "WARNING"
    assert f"session {session_alias(session.session_id or '')} goes on" in changed.getMessage()


async def test_a_build_that_speaks_another_version_ends_the_session(database: str) -> None:
    memory = Memory(hooks=False)
    async with two(database, memory.server, renew=0.1) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        recorded = json.loads(await tables.value("select body from pgmcp.journal where kind = 'result'"))
        recorded["result"]["protocolVersion"] = "2024-01-01"
        await tables.execute("update pgmcp.journal set body = $1 where kind = 'result'", json.dumps(recorded).encode())
        await bury(tables, nodes[0])
        call = await session.request(nodes[1].url, "tools/call", {"name": "count"})
        await call.rest()
        assert call.messages == [], "the exchange ends with the session"
        assert (await session.request(nodes[1].url, "tools/call", {"name": "count"})).status == 404


async def test_an_operator_may_end_sessions_instead(database: str) -> None:
    memory = Memory()
    async with (
        two(database, memory.server, renew=0.1, on_owner_change="end") as (nodes, tables),
        RawSession() as session,
        RawSession() as idle,
    ):
        await session.open(nodes[0].url)
        await idle.open(nodes[0].url)
        standalone = await session.get(nodes[1].url)
        await bury(tables, nodes[0])
        await standalone.rest()
        assert (await session.request(nodes[1].url, "ping")).status == 404
        call = await idle.request(nodes[1].url, "ping")
        if call.status != 404:
            await call.rest()
            assert call.messages == []
        assert (await idle.request(nodes[1].url, "ping")).status == 404
    assert memory.restored == []


async def test_a_restore_that_fails_is_tried_again_and_then_given_up(database: str) -> None:
    tries: list[str] = []

    def served() -> MCPServer:
        server = Memory(hooks=False).server()

        async def restore(state: SessionState, _: object) -> None:
            tries.append(state.session_id)
            if await state.get("count") or len(tries) < 3:
                message = "not this time"
                raise RuntimeError(message)

        keep_memory(server, restore=restore)
        return server

    async with (
        two(database, served, renew=0.1, poll=0.2) as (nodes, tables),
        RawSession() as lucky,
        RawSession() as hopeless,
    ):
        await lucky.open(nodes[0].url)
        await hopeless.open(nodes[0].url)
        await counted(hopeless, nodes[0].url)
        await bury(tables, nodes[0])
        assert await counted(lucky, nodes[1].url) == {"memory": 1, "kept": 1, "restored": True}
        assert tries == [lucky.session_id] * 3
        call = await hopeless.request(nodes[1].url, "tools/call", {"name": "count"})
        await call.rest()
        assert tries[3:] == [hopeless.session_id] * 3
        assert (await hopeless.request(nodes[1].url, "ping")).status == 404
        assert await tables.value("select restores from pgmcp.sessions") == 0


async def test_a_handshake_that_nobody_wrote_down_to_its_end_is_ended_by_the_new_owner(database: str) -> None:
    """The former owner took ``initialized`` and died before the journal had it."""
    async with two(database, Memory().server, renew=0.1) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        await eventually(lambda: written(tables), "the journal has it")
        await tables.execute("delete from pgmcp.journal where kind = 'initialized'")
        await bury(tables, nodes[0])
        assert (await counted(session, nodes[1].url))["restored"]


async def written(tables: Tables) -> bool:
    return bool(await tables.value("select count(*) from pgmcp.journal where kind = 'initialized'"))


async def test_the_same_node_may_get_its_sessions_back_under_its_new_id(database: str) -> None:
    async with (
        cluster(database, Memory().server, 1, renew=0.1) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        await counted(session, nodes[0].url)
        former = nodes[0].incarnation
        await bury(tables, nodes[0])
        await eventually(lambda: nodes[0].present not in {None, former}, "it is back")
        await eventually(lambda: nodes[0].incarnation.lease.trusted, "and trusted")
        assert await counted(session, nodes[0].url) == {"memory": 1, "kept": 2, "restored": True}


async def test_many_sessions_are_taken_by_all_who_are_left(database: str) -> None:
    async with (
        contextlib.AsyncExitStack() as stack,
        cluster(database, everything, 3, renew=0.1) as nodes,
        tables_of(database) as tables,
    ):
        sessions = [await stack.enter_async_context(RawSession()) for _ in range(60)]
        slow = {"name": "slow", "arguments": {"seconds": 60, "steps": 60}}
        calls = []
        for session in sessions:
            await session.open(nodes[0].url)
            calls.append(await session.request(nodes[1].url, "tools/call", slow, request_id=5))
        await eventually(lambda: all_claimed(tables, len(sessions)), "all run")
        former = nodes[0].incarnation.node_id
        await bury(tables, nodes[0])
        answers = await asyncio.gather(*(call.response(5, 20) for call in calls))
        assert {answer["error"]["data"]["reason"] for answer in answers} == {"owner_lost"}
        owners = await tables.rows("select owner, count(*) from pgmcp.sessions group by owner")
        assert former not in {row["owner"] for row in owners}
        assert len(owners) > 1, "more than one node took some"


async def all_claimed(tables: Tables, count: int) -> bool:
    running = "select count(*) from pgmcp.requests where method = 'tools/call' and claimed_epoch is not null"
    return bool(await tables.value(running) == count)


class Gate:
    """Servers with calls that wait for the test; what ran is counted outside of them."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.open = asyncio.Event()

    def server(self) -> MCPServer:
        server = MCPServer("gate")

        async def wait(text: str) -> str:
            self.ran.append(text)
            await self.open.wait()
            return text

        server.tool(name="safe", annotations=ToolAnnotations(read_only_hint=True), structured_output=False)(wait)
        server.tool(name="unsafe", structured_output=False)(wait)
        return server


@pytest.mark.parametrize("name", ["safe", "unsafe"])
async def test_a_post_that_is_repeated_over_a_death_joins_the_first(database: str, name: str) -> None:
    """The client lost its connection with the owner, and sends the same request again to another node (G5)."""
    gate = Gate()
    async with two(database, gate.server, renew=0.1) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        call = {"name": name, "arguments": {"text": "x"}}
        first = await session.request(nodes[0].url, "tools/call", call, request_id=7)
        await eventually(lambda: gate.ran, "it runs")
        await nodes[0].leave()  # its streams end, its sessions are taken over
        await first.rest()
        again = await session.request(nodes[1].url, "tools/call", call, request_id=7)
        if name == "safe":
            await eventually(lambda: len(gate.ran) == 2, "it runs once more")
            gate.open.set()
            assert (await again.response(7))["result"]["content"][0]["text"] == "x"
        else:
            assert (await again.response(7))["error"]["data"]["reason"] == "owner_lost"
        await again.rest()
        assert gate.ran == ["x"] * (2 if name == "safe" else 1)
        assert await tables.value("select count(*) from pgmcp.requests where rpc_id = '7'") == 1
        resumed = await session.get(nodes[1].url, first.last_event_id)
        assert resumed.status in {200, 204}, "no 404, whoever carries the answer"


async def test_a_request_whose_claim_came_to_nobody_runs_all_the_same(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A try that was given up as lost committed after its repeat: nobody asks for what it took."""
    gate = Gate()
    gate.open.set()
    async with two(database, gate.server, poll=60) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        host = nodes[0].incarnation.host
        await eventually(lambda: written(tables), "the handshake is over")
        await eventually(lambda: host.movable(busy=True), "and nothing is claimed")
        with monkeypatch.context() as deaf:
            deaf.setattr(host, "wake", lambda _: None)
            call = await session.request(nodes[1].url, "tools/call", {"name": "unsafe", "arguments": {"text": "x"}})
            late = "update pgmcp.requests set claimed_epoch = 1, runs = 1, claimed_at = now() - interval '11 s' "
            await tables.execute(late + "where finished_at is null")

        async def found() -> bool:
            await host.survey()  # passes by a session that is just claiming
            return bool(gate.ran)

        await eventually(found, "a survey finds it")
        assert (await call.response(1))["result"]["content"][0]["text"] == "x"
        assert gate.ran == ["x"]


async def test_a_long_call_is_nobodys_lost_claim(database: str) -> None:
    gate = Gate()
    async with two(database, gate.server) as (nodes, tables), RawSession() as session:
        await session.open(nodes[0].url)
        call = await session.request(nodes[1].url, "tools/call", {"name": "unsafe", "arguments": {"text": "x"}})
        await eventually(lambda: gate.ran, "it runs")
        await tables.execute("update pgmcp.requests set claimed_at = now() - interval '1 hour'")
        await nodes[0].incarnation.host.survey()
        gate.open.set()
        await call.response(1)
        assert gate.ran == ["x"]


async def test_a_takeover_whose_reply_was_lost_is_found_also_without_work(database: str) -> None:
    """Only a subscription waits for the session: nothing of it is ever unclaimed."""
    async with two(database, everything) as (nodes, _), RawSession() as session:
        await session.open(nodes[0].url)
        await session.call(nodes[0].url, "resources/subscribe", {"uri": WATCHED})
        standalone = await session.get(nodes[1].url)
        await nodes[0].leave()
        host = nodes[1].incarnation.host
        await eventually(lambda: host.movable(busy=True), "it is taken and restored")
        (key,) = host.actors
        host.drop(key)
        for _ in range(2):
            await host.survey()
        await eventually(lambda: host.movable(busy=True), "it is found")
        await session.call_tool(nodes[1].url, "touch_watched_resource", text="x")
        await standalone.message(UPDATED)


async def test_what_a_restore_that_failed_had_taken_on_is_inherited_again(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unsafe call was adopted, to be ended; the restore failed before it was. It must not count as not started."""
    gate = Gate()
    failing = [True]
    reject = Actor.reject

    async def rejected(actor: Actor, *args: Any) -> None:
        if failing.pop() if failing else False:
            message = "not this time"
            raise RuntimeError(message)
        await reject(actor, *args)

    monkeypatch.setattr(Actor, "reject", rejected)
    async with two(database, gate.server, poll=0.1) as (nodes, _), RawSession() as session:
        await session.open(nodes[0].url)
        call = await session.request(nodes[1].url, "tools/call", {"name": "unsafe", "arguments": {"text": "x"}})
        await eventually(lambda: gate.ran, "it runs")
        await nodes[0].leave()
        answer = await call.response(1)
        assert answer["error"]["data"] == {"reason": "owner_lost", "outcome": "unknown", "runs": 1}
        assert (gate.ran, failing) == (["x"], [])
