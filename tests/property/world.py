"""Some nodes, a database, clients, and the books that say what must never have happened."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pgmcp.errors import PgmcpError
from pgmcp.session.restore import ATTEMPTS
from pgmcp.settings import Settings
from pgmcp.types import (
    ANONYMOUS,
    Attachment,
    Cursor,
    Event,
    Message,
    NewSession,
    NodeId,
    Ownership,
    RequestKey,
    SessionKey,
    StreamId,
    StreamKind,
)
from tests.chaos import judge
from tests.harness.clock import FakeClock, settle
from tests.harness.memory import MemoryCluster, MemoryTimeline
from tests.harness.memory.tables import TABLES, Standby
from tests.property.losses import follow_each_other, kept_sum, loss
from tests.property.nodes import SeededIds, SimNode
from tests.property.server import VERSION

OWNERS = frozenset({"claim", "append", "establish", "write_journal", "drop_sink", "adopt", "begin_restore", "condemn"})
"""Statements that only a node sends that may act."""

MOST_RUNS = 2

PATIENCE = 180.0
"""Seconds of good weather after which everything must have ended."""


@dataclass
class Call:
    """A client's request."""

    session: SimSession
    body: bytes
    rpc_id: str
    safe: bool
    stream: StreamId | None = None
    acknowledged: bool = False
    asked_at: float = 0.0
    posts: int = 0
    losses: int = 0
    """Times that a failover has lost it."""
    runs: int = 0
    read: list[Event] = field(default_factory=list)

    @property
    def most_runs(self) -> int:
        """Whoever repeats a request of which nothing is left sends another one, to all appearances."""
        return 1 + min(self.losses, self.posts - 1)


@dataclass
class Sum:
    """One run of a tool that adds one to a number that its session keeps."""

    session: str
    rpc_id: str
    began: float
    ended: float = math.inf
    told: int | None = None
    """What the tool knows to be stored; None if it does not know."""


@dataclass
class SimSession:
    """A client's session."""

    session_id: str
    key: SessionKey | None = None
    ended: bool = False
    established: bool = False
    changed_at: float = -math.inf
    """When it last got another owner, or was to get one, or a failover lost anything of it."""


class World:
    """One run's cluster.

    Args:
        nodes: how many nodes there are at first.
    """

    def __init__(self, clock: FakeClock, nodes: int) -> None:
        self.clock, self.settings, self.ids = clock, Settings(), SeededIds()
        self.cluster = MemoryCluster(clock, self.settings)
        self.cluster.issued, self.cluster.stored = self._issued, self._stored
        self.cluster.owned, self.cluster.died = self._owned, self._died
        self.nodes: list[SimNode] = []
        self.sessions: list[SimSession] = []
        self.calls: list[Call] = []
        self.wrong: list[str] = []
        self._by_id: dict[NodeId, SimNode] = {}
        self._owners: dict[SessionKey, tuple[NodeId | None, int]] = {}
        self._changes: Counter[SessionKey] = Counter()
        self._lost_events: set[tuple[StreamId, int]] = set()
        self._losing_failovers = 0
        self._fair = False
        self.sums: list[Sum] = []
        self._tasks: set[asyncio.Task[object]] = set()
        self._crashes: list[str] = []
        self._asking: dict[asyncio.Task[object], SimNode] = {}
        for _ in range(nodes):
            self.start_node()

    # -- nodes -------------------------------------------------------------------------------------------------------

    def start_node(self) -> None:
        """A process starts; when it is declared dead it joins again."""
        self.nodes.append(self._incarnation(len(self.nodes)))

    def _incarnation(self, number: int, timeline: MemoryTimeline | None = None) -> SimNode:
        node = SimNode(number, self.cluster, self.clock, self.ids, self.settings, self, timeline)
        self._by_id[node.node] = node
        self.spawn(self._run(node))
        return node

    async def _run(self, node: SimNode) -> None:
        joining = asyncio.create_task(node.join())
        await node.over.wait()
        await node.stop()
        joining.cancel()
        if not node.gone and not node.left:
            self.nodes[node.number] = self._incarnation(node.number, node.timeline)

    def _ask(self, node: SimNode, work: Coroutine[Any, Any, object]) -> None:
        """A client waits for an exchange with a node."""
        task = self.spawn(work)
        self._asking[task] = node
        task.add_done_callback(self._asking.pop)

    def spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Begin what goes on beside the test; what it raises is a crash."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._crashes.append(repr(task.exception()))

    # -- clients -----------------------------------------------------------------------------------------------------

    def open_session(self, node: SimNode) -> SimSession:
        """A client says initialize and, when it is answered, initialized."""
        session = SimSession(f"node-{self.ids.token()}")
        self.sessions.append(session)
        self._ask(node, self._handshake(node, session))
        return session

    async def _handshake(self, node: SimNode, session: SimSession) -> None:
        new = NewSession(session.session_id, ANONYMOUS, "streamable", StreamId(self.ids.uuid()))
        try:
            await node.lease.acting()
            session.key = (await node.host.open(new)).session
        except PgmcpError:
            return
        client = {"name": "client", "version": "1"}
        params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}
        first = self._call(session, "initialize", params, safe=True)
        await self._post(node, first)
        session.established = True

    def call_tool(self, session: SimSession, node: SimNode, *, safe: bool, seconds: float) -> Call:
        """A client calls a tool, by a POST to a node."""
        params = {"name": "safe" if safe else "unsafe", "arguments": {"seconds": seconds}}
        call = self._call(session, "tools/call", params, safe=safe)
        self.post(call, node)
        return call

    def _call(self, session: SimSession, method: str, params: Mapping[str, object], *, safe: bool) -> Call:
        number = len(self.calls)
        body = json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode()
        call = Call(session, body, str(number), safe, asked_at=self.clock.now)
        self.calls.append(call)
        return call

    def post(self, call: Call, node: SimNode) -> None:
        """A POST of a request, also a repeated one."""
        self._ask(node, self._post(node, call))

    async def _post(self, node: SimNode, call: Call) -> None:
        call.posts += 1
        message = json.loads(call.body)
        name = message["params"].get("name")
        stream = StreamId(self.ids.uuid())
        accepted = await self._accept(node, call.session, call.rpc_id, message["method"], name, call.body, stream)
        if accepted is not None:
            if call.acknowledged and accepted != call.stream:
                self.wrong.append(f"call {call.rpc_id} was stored twice")
            call.acknowledged, call.stream = True, accepted

    def notify(self, session: SimSession, node: SimNode, method: str, params: Mapping[str, object]) -> None:
        """A client's notification."""
        body = json.dumps({"jsonrpc": "2.0", "method": method, "params": params}).encode()
        self._ask(node, self._accept(node, session, None, method, None, body, None))

    async def _accept(
        self, node: SimNode, session: SimSession, rpc_id: str | None, method: str, name: str | None, body: bytes,
        stream: StreamId | None,
    ) -> StreamId | None:  # fmt: skip
        key = RequestKey(self.ids.uuid())
        context = node.keys.seal(b'{"context":{},"ask":true}', f"{session.session_id}/{key.hex}".encode())
        message = Message(key, session.session_id, ANONYMOUS, rpc_id, method, name, body, context, stream)
        try:
            accepted = await node.store.inbox.accept([message])
        except PgmcpError:
            return None
        facts = accepted.facts
        if facts.orphaned:
            node.takeover.touch(facts.session)
        elif not accepted.joined:
            node.wakeups.inbox(facts.owner, facts.session)
        return accepted.stream

    def resume(self, call: Call, node: SimNode) -> None:
        """A client comes back to its call's stream."""
        self._ask(node, self._resume(call, node))

    async def _resume(self, call: Call, node: SimNode) -> None:
        try:
            attached = await node.store.log.attach(call.session.session_id, ANONYMOUS, call.stream)
            if not isinstance(attached, Attachment):
                return
            if attached.facts.orphaned:
                node.takeover.touch(attached.facts.session)
            page = await node.store.log.read(Cursor(attached.stream, attached.sink_epoch, 0))
        except PgmcpError:
            return
        if not page.attached:
            return  # replaced meanwhile
        known, now = call.read, list(page.events)
        if not follow_each_other([event.seq for event in now], self.cluster.term):
            self.wrong.append(f"call {call.rpc_id}: a page has gaps")
        left = [event for event in known if (call.stream, event.seq) not in self._lost_events]
        if now[: len(left)] != left[: len(now)]:
            self.wrong.append(f"call {call.rpc_id}: what was read has changed")
        if known and any(event.seq <= known[-1].seq for event in now[len(left) :]):
            self.wrong.append(f"call {call.rpc_id}: what comes after what was read has no greater number")
        call.read = known + now[len(left) :]

    async def give_away(self, session: SimSession, node: SimNode, to: SimNode, *, busy: bool) -> None:
        """A node hands a session over; if that is refused, it restores the session itself."""
        if session.key is not None:
            try:
                await node.give_away(session.key, to.node, busy=busy)
            finally:
                session.changed_at = self.clock.now

    # -- weather -----------------------------------------------------------------------------------------------------

    def database_goes_away(self, *, keeps_lines: bool) -> None:
        """Nobody reaches the database; with its restart every line is gone too."""
        self.cluster.away = True
        if not keeps_lines:
            for node in self.nodes:
                node.lose_line()

    def go_away_for(self, seconds: float) -> None:
        """An outage begins at this very moment."""
        self.database_goes_away(keeps_lines=False)
        self.spawn(self._come_back(seconds))

    async def _come_back(self, seconds: float) -> None:
        await self.clock.sleep(seconds)
        self.cluster.away = False

    def crash(self) -> None:
        """The database crashes and is back at once."""
        self.cluster.crash()
        for node in self.nodes:
            node.lose_line()

    def fail_over(self, standby: Standby | None = None, *, claims: int = 0, paces: Sequence[float] = ()) -> None:
        """A standby is promoted, which has all that was confirmed, or lacks the last moments of it.

        Args:
            claims, paces: see ``MemoryCluster.fail_over``.
        """
        if standby is not None and (standby.primary != self.cluster.primary or self._fair):
            return  # it was a standby of another primary
        before = {name: getattr(self.cluster, name) for name in TABLES}
        if standby is not None:
            self._write_off(before, standby.tables)
        self.cluster.fail_over(standby, claims=claims, paces=paces)
        for row in self.cluster.sessions.values():
            self._owners[row.id] = row.owner, row.epoch
        for node in self.nodes:
            node.lose_line()

    def falls_behind(self, seconds: float, away: float, *, claims: int = 0, paces: Sequence[float] = ()) -> None:
        """From now on the standby receives nothing; so much later it is promoted.

        Args:
            away: seconds that this takes.
            claims, paces: see ``MemoryCluster.fail_over``.
        """
        standby = self.cluster.standby()

        async def later() -> None:
            await self.clock.sleep(seconds)
            if not self._fair:
                await self.fails_over(away, standby, claims=claims, paces=paces)

        self.spawn(later())

    async def fails_over(
        self, away: float, standby: Standby | None = None, *, claims: int = 0, paces: Sequence[float] = ()
    ) -> None:
        """The primary is gone, and after a while a standby is promoted."""
        self.database_goes_away(keeps_lines=False)
        await self.clock.sleep(away)
        self.cluster.away = False
        self.fail_over(standby, claims=claims, paces=paces)

    def _write_off(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Note what is lost."""
        lost = loss(before, after)
        self._losing_failovers += 1
        self._lost_events |= lost.events
        for key in before["sessions"].keys() - after["sessions"].keys():
            self._owners[key] = None, self._owners[key][1]  # the key may come up again
        for session in self.sessions:
            if session.session_id in lost.harmed:
                session.changed_at = self.clock.now
            if session.session_id in lost.sessions:
                session.ended, session.key = True, None
            elif session.key is not None:
                self._write_off_sums(session.session_id, kept_sum(after, session.key))
        for call in self.calls:
            if call.rpc_id in lost.requests:
                call.losses += 1
                call.acknowledged, call.read = False, []  # its client is told that nobody knows

    def _write_off_sums(self, session_id: str, kept: int) -> None:
        for begun in self.sums:
            if begun.session == session_id and begun.told is not None and begun.told > kept:
                begun.told = None

    async def database_is_away(self, seconds: float, *, keeps_lines: bool) -> None:
        """An outage from its beginning to its end."""
        self.database_goes_away(keeps_lines=keeps_lines)
        await self.clock.advance(seconds)
        self.cluster.away = False

    def owner(self, session: SimSession) -> SimNode | None:
        """The node that owns a session, if it lives."""
        row = self.cluster.session_called(session.session_id)
        node = None if row is None else self._by_id[row.owner]
        return node if node is not None and node.alive else None

    async def clear_up(self) -> None:
        """Good weather from now on."""
        self.cluster.away, self._fair = False, True
        for node in self.nodes:
            node.keys.takes = 0.0
            if not node.gone and (node.clock.frozen or node.store.wire.is_cut):
                node.recovered()
            node.store.wire.clear()
            if not node.gone:
                node.clock.thaw()
        if not any(node.alive for node in self.nodes):
            self.start_node()
        await self._end_all()
        for session in self.sessions:
            if session.established and not session.ended:  # and each goes on
                self.call_tool(session, next(node for node in self.nodes if node.alive), safe=True, seconds=1)
        await self._end_all()

    async def _end_all(self) -> None:
        """Wait until everything that was acknowledged has ended."""
        waited = 0.0
        while (self._waits() or self.unfinished()) and waited < PATIENCE:
            await self.clock.advance(2)
            waited += 2
        await settle()

    async def close(self) -> None:
        """End every task of the run."""
        self.cluster.away = False
        for node in self.nodes:
            node.clock.thaw()
        for _ in range(10):
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await settle()
        assert not tasks, f"these tasks do not end: {tasks}"

    # -- the books ---------------------------------------------------------------------------------------------------

    def _issued(self, node: NodeId, statement: str) -> None:
        if statement in OWNERS and not self._by_id[node].may_act:
            self.wrong.append(f"node {self._by_id[node].number} sent {statement} without trust")

    def _stored(self, node: NodeId, statement: str, ownership: Ownership) -> None:
        if self._owners[ownership.session] != (node, ownership.epoch):
            number = self._by_id[node].number
            self.wrong.append(f"{statement} of node {number} was stored in epoch {ownership.epoch}, which was over")
        if statement == "end_owned_session":
            self._check_end(ownership.session)

    def _owned(self, node: NodeId, ownership: Ownership) -> None:
        former, before = self._owners.get(ownership.session, (None, 0))
        if ownership.epoch <= before:
            self.wrong.append(f"session {ownership.session} has a new owner and still epoch {ownership.epoch}")
        if self.cluster.lives(former) and not self._is_given(ownership):
            self.wrong.append(f"session {ownership.session} was taken from a living node")
        self._owners[ownership.session] = node, ownership.epoch
        self._changes[ownership.session] += 1
        for known in self.sessions:
            if known.key == ownership.session:
                known.changed_at = self.clock.now

    def _is_given(self, ownership: Ownership) -> bool:
        session, _, _, epoch, reason = self.cluster.takeovers[-1]
        return (session, epoch, reason) == (ownership.session, ownership.epoch, "drain")

    def _died(self, node: NodeId) -> None:
        if self._by_id[node].is_well:
            self.wrong.append(f"node {self._by_id[node].number} was declared dead, and is well")

    def _check_end(self, session: SessionKey) -> None:
        changes = self._changes[session] - 1
        if changes + self.cluster.term <= ATTEMPTS:
            self.wrong.append(f"session {session} was ended by a node, after {changes} changes of owner")
        for known in self.sessions:
            known.ended |= known.key == session

    def taken(self, node: SimNode) -> None:
        """See ``Witness``."""
        if not node.may_act:
            self.wrong.append(f"node {node.number} handed a message to its server without trust")

    def ran(self, node: SimNode, rpc_id: str) -> None:
        """See ``Witness``."""
        call = self.calls[int(rpc_id)]
        call.runs += 1
        if call.runs > (MOST_RUNS + self._losing_failovers if call.safe else call.most_runs):
            self.wrong.append(f"call {rpc_id} (safe: {call.safe}) ran {call.runs} times")

    def adds(self, node: SimNode, rpc_id: str) -> Callable[[int], None]:
        """See ``Witness``."""
        begun = Sum(self.calls[int(rpc_id)].session.session_id, rpc_id, self.clock.now)
        self.sums.append(begun)

        def stored(told: int) -> None:
            begun.ended, begun.told = self.clock.now, told

        return stored

    def _waits(self) -> bool:
        return any(not node.gone for node in self._asking.values())

    def unfinished(self) -> list[str]:
        """Acknowledged calls that have not ended."""
        ended = {row.message.rpc_id for row in self.cluster.requests.values() if row.finished}
        return [
            call.rpc_id
            for call in self.calls
            if call.acknowledged and not call.session.ended and call.rpc_id not in ended
        ]

    def check(self) -> None:
        """What must hold at any time."""
        assert not self.wrong, str(self.wrong)
        assert not self._crashes, str(self._crashes)
        for stream in self.cluster.streams.values():
            if stream.kind is StreamKind.REQUEST:
                numbers = [*sorted(stream.events), stream.next_seq]
                assert follow_each_other(numbers, self.cluster.term), f"a stream's numbers have a gap: {numbers}"
            if self._lost_events:
                again = [seq for seq in stream.events if (stream.id, seq) in self._lost_events]
                assert not again, f"numbers {again} of a stream were given out twice"
        history = [judge.Call(each.session, each.rpc_id, each.began, each.ended, each.told) for each in self.sums]
        assert judge.judge(history) == []
        for row in self.cluster.requests.values():
            assert row.runs <= MOST_RUNS, f"call {row.message.rpc_id} was started {row.runs} times"

    def check_end(self) -> None:
        """What must hold when the weather has been good for a while."""
        self.check()
        assert not self.unfinished(), f"acknowledged calls never end: {self._picture()}"
        for call in self.calls:
            if call.acknowledged and not call.session.ended:
                answers = self._answers(call)
                assert len(answers) == 1, f"call {call.rpc_id} was answered {len(answers)} times: {answers}"
                self._check_answer(call, answers[0])

    def _check_answer(self, call: Call, answer: dict[str, Any]) -> None:
        """Nobody knows what became of a call only if its session had another owner, or something of it was lost."""
        reason = ((answer.get("error") or {}).get("data") or {}).get("reason")
        if reason == "owner_lost":
            assert call.session.changed_at >= call.asked_at, f"call {call.rpc_id} was given up: {self._picture()}"

    def _picture(self) -> str:
        """What the tables and the nodes say, for people."""
        tables = self.cluster
        requests = [
            (row.message.rpc_id, row.message.method, row.claimed_epoch, row.runs, row.outcome)
            for row in tables.requests.values()
        ]
        sessions = [(row.id, tables.nodes.get(row.owner), row.epoch, row.restores) for row in tables.sessions.values()]
        nodes = [(node.number, node.node, node.lease.state, node.host.sessions, node.alive) for node in self.nodes]
        return f"requests {requests} sessions {sessions} nodes {nodes} takeovers {tables.takeovers}"

    def _answers(self, call: Call) -> list[dict[str, Any]]:
        stream = self.cluster.streams.get(call.stream) if call.stream else None
        messages = [] if stream is None else [json.loads(stream.events[seq][0]) for seq in sorted(stream.events)]
        return [message for message in messages if "id" in message and "method" not in message]
