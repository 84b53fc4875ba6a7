"""The stage: node processes that are hit, the database and the truth to look into, and clients that carry on."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.harness.clients import CONNECT, Message, RawExchange, RawSession, SseEvent
from tests.harness.cluster import Tables
from tests.harness.processes import NodeProcess, free_ports
from tests.harness.waiting import eventually

TARGET = "tests/chaos/server.py:mcp"
WAIT = 30.0
"""Seconds after which a test gives up; what is measured has limits of its own."""

GAPS = """
select st.id, st.next_seq, array_agg(e.seq order by e.seq) as seqs
from pgmcp.streams st join pgmcp.events e on e.stream = st.id
where st.kind = 'request'
group by st.id
having array_agg(e.seq order by e.seq) <> array(select generate_series(1, st.next_seq - 1))
"""
UNFINISHED = "select count(*) from pgmcp.requests where finished_at is null"
TWICE = "select count(*) from pgmcp.requests where runs > 2"


class Stage:
    """A cluster of node processes that share a database."""

    def __init__(self, database: str, tables: Tables, folder: Path) -> None:
        self.tables, self.hit_at = tables, 0.0
        self.nodes: list[NodeProcess] = []
        self._database, self._folder = database, folder
        self._truth = folder / "truth"
        self._truth.touch()
        self._http = httpx.AsyncClient(trust_env=False, verify=False, timeout=httpx.Timeout(2, connect=CONNECT))
        self._opened: list[str] = []

    # -- nodes -----------------------------------------------------------------------------------------------------

    def add(self, count: int, **env: str) -> list[NodeProcess]:
        """Begin to start more nodes."""
        added = [
            NodeProcess(
                TARGET,
                database_url=self._database,
                name=f"node-{len(self.nodes) + number}",
                port=port,
                log_dir=self._folder,
                env={"TRUTH": str(self._truth), "PGMCP_RERUN": "named", "PGMCP_DRAIN_LIMIT": "2", **env},
            ).start()
            for number, port in enumerate(free_ports(count), start=1)
        ]
        self.nodes += added
        return added

    def remove(self, count: int) -> None:
        """End the nodes that were added last."""
        for node in self.nodes[-count:]:
            node.kill()
        del self.nodes[-count:]

    async def ready(self, nodes: Sequence[NodeProcess] | None = None) -> None:
        """Start what does not run, and wait until every node is ready."""
        for node in self.nodes if nodes is None else nodes:
            if not node.running:
                node.start()
        for node in self.nodes if nodes is None else nodes:
            await eventually(partial(self.is_ready, node), f"{node.name} is ready\n{node.log[-3000:]}", WAIT)

    async def is_ready(self, node: NodeProcess) -> bool:
        """Whether a node says that it is; one that has ended meanwhile is started."""
        if not node.running:
            node.start()
        try:
            return (await self._http.get(f"{node.url}/readyz")).status_code == 200
        except httpx.HTTPError:
            await asyncio.sleep(0.05)
            return False

    def kill(self, *nodes: NodeProcess) -> None:
        """End nodes at once (SIGKILL)."""
        self.hit()
        for node in nodes:
            node.signal(signal.SIGKILL)
        for node in nodes:
            node.wait()

    async def frozen(self, node: NodeProcess) -> None:
        """Freeze a node (SIGSTOP) once and for all who ask for it."""
        node.pause()
        stat = Path(f"/proc/{node.pid}/stat")
        await eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", f"{node.name} is frozen")

    def hit(self) -> None:
        """From now on it is measured how long clients wait."""
        self.hit_at = asyncio.get_running_loop().time()

    def since(self) -> float:
        """Seconds since the last blow."""
        return asyncio.get_running_loop().time() - self.hit_at

    def living(self, *but: NodeProcess) -> list[NodeProcess]:
        """The nodes that run, without some."""
        return [node for node in self.nodes if node.running and node not in but]

    def by_pid(self, pid: int) -> NodeProcess:
        """The node that is this process."""
        return next(node for node in self.nodes if node.pid == pid)

    async def node_id(self, node: NodeProcess) -> uuid.UUID:
        """The id of a node's present incarnation."""
        found = await self.tables.value("select node_id from pgmcp.live_nodes where node_name = $1", node.name)
        assert found is not None, f"{node.name} is not in live_nodes"
        return uuid.UUID(str(found))

    async def state_of(self, node_id: uuid.UUID) -> str:
        """What the table says of an incarnation."""
        return str(await self.tables.value("select state from pgmcp.nodes where node_id = $1", node_id))

    async def owner_of(self, session: RawSession) -> str:
        """The name of a session's owner."""
        query = """
            select n.name from pgmcp.sessions s join pgmcp.nodes n on n.node_id = s.owner where s.session_id = $1
        """
        return str(await self.tables.value(query, session.session_id))

    # -- the truth -------------------------------------------------------------------------------------------------

    def truth(self, what: str, text: str) -> list[int]:
        """In which processes something happened."""
        lines = [json.loads(line) for line in self._truth.read_text().splitlines()]
        return [pid for kind, about, pid in lines if (kind, about) == (what, text)]

    async def happened(self, what: str, text: str) -> None:
        """Wait until something has happened."""
        await eventually(lambda: self.truth(what, text), f"{what} of {text}", WAIT)

    def check_truth(self) -> None:
        """Nothing ran more often than it may."""
        runs: dict[str, int] = {}
        for line in self._truth.read_text().splitlines():
            kind, text, _ = json.loads(line)
            runs[text] = runs.get(text, 0) + (kind == "start")
        most = {text: count for text, count in runs.items() if count > (1 if text.startswith("unsafe") else 2)}
        assert not most, f"ran too often: {most}"

    async def check(self) -> None:
        """Every request has ended, no stream has a gap, and nothing ran too often."""

        async def ended() -> bool:
            return bool(await self.tables.value(UNFINISHED) == 0)

        await eventually(ended, "every request has ended")
        assert await self.tables.rows(GAPS) == []
        assert await self.tables.value(TWICE) == 0
        self.check_truth()

    # -- clients ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def session(self, owner: NodeProcess, edge: NodeProcess) -> AsyncIterator[RawSession]:
        """A client whose session is owned by one node; the handshake ends on another."""
        async with RawSession(capabilities={"elicitation": {"form": {}}}) as session:
            await session.open(owner.url, edge.url)
            self._opened.append(str(session.session_id))
            yield session

    async def end_sessions(self) -> None:
        """Leave nothing to the next round that would be taken over with its sessions."""
        while self._opened:
            headers = {"mcp-session-id": self._opened.pop()}
            assert (await self._http.delete(self.nodes[0].mcp_url, headers=headers)).status_code in {200, 404}

    async def call(self, session: RawSession, edge: NodeProcess, tool: str, **arguments: Any) -> Call:
        """Call a tool through a node."""
        call = Call(self, session, tool, arguments)
        await call.post(edge)
        return call

    async def close(self) -> None:
        """Hang up; every node ends at once."""
        await self._http.aclose()
        self.kill(*self.nodes)


class Call:
    """One call of a client that carries on: when a node goes, it resumes on another one."""

    def __init__(self, stage: Stage, session: RawSession, tool: str, arguments: dict[str, Any]) -> None:
        self._stage, self._session = stage, session
        self.id = session.next_id()
        self.text = str(arguments.get("text", ""))
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": self.id}}
        self.body = {"jsonrpc": "2.0", "id": self.id, "method": "tools/call", "params": params}
        self.events: list[SseEvent] = []
        self._exchange: RawExchange | None = None
        self._last: str | None = None

    @property
    def messages(self) -> list[Message]:
        """What has come so far."""
        return [message for event in self.events if (message := event.message) is not None]

    async def post(self, edge: NodeProcess) -> None:
        """Send the call, for the first time or again."""
        exchange = await self._session.post(edge.url, self.body)
        assert exchange.is_stream, f"{exchange.status} {exchange.body!r}"
        self._exchange = exchange

    async def resume(self, edge: NodeProcess) -> None:
        """Go on with the stream on another node."""
        if self._exchange is not None:
            await self._exchange.close()
        exchange = await self._session.get(edge.url, self._last)
        assert exchange.is_stream, f"{exchange.status} {exchange.body!r}"
        self._exchange = exchange

    async def next(self, timeout: float = WAIT) -> SseEvent | None:
        """The next event; None at the end of the exchange."""
        assert self._exchange is not None
        event = await self._exchange.next(timeout)
        if event is not None:
            self._last = event.id or self._last
            if event.data:
                self.events.append(event)
        return event

    async def until(self, wanted: Callable[[Message], bool], timeout: float = WAIT) -> Message:
        """Take messages up to a certain one, on whichever node."""
        async with asyncio.timeout(timeout):
            while True:
                event = await self._next_somewhere()
                if (message := event.message) is not None and wanted(message):
                    return message

    async def _next_somewhere(self) -> SseEvent:
        while True:
            try:
                event = await self.next()
            except httpx.HTTPError:
                event = None
            if event is not None:
                return event
            await self._resume_somewhere()

    async def _resume_somewhere(self) -> None:
        for node in self._stage.living():
            try:
                exchange = await self._session.get(node.url, self._last)
            except httpx.HTTPError:
                continue
            if exchange.status == 503:
                continue
            assert exchange.is_stream, f"{exchange.status} {exchange.body!r}"
            self._exchange = exchange
            return
        await asyncio.sleep(0.05)

    async def method(self, method: str) -> Message:
        """The next request or notification of the server with this method."""
        return await self.until(lambda message: message.get("method") == method)

    async def answer(self, timeout: float = WAIT) -> Message:
        """The answer; every event before it came exactly once."""

        def answers(message: Message) -> bool:
            return message.get("id") == self.id and "method" not in message

        answer = next(filter(answers, self.messages), None) or await self.until(answers, timeout)
        ids = [event.id.rpartition(".") for event in self.events if event.id is not None]
        assert [int(seq) for _, _, seq in ids] == list(range(1, len(self.events) + 1)), [e.id for e in self.events]
        assert len({stream for stream, _, _ in ids}) == 1
        return answer

    async def result(self) -> tuple[str, int]:
        """The text that a tool returned, and the process that did."""
        answer = await self.answer()
        assert "result" in answer, answer
        text, _, pid = answer["result"]["content"][0]["text"].rpartition(" ")
        return text, int(pid)


def text_of(kind: str) -> str:
    """A text that nobody else has."""
    return f"{kind}-{uuid.uuid4().hex[:12]}"


Case = AsyncIterator[None]
"""What one client does before the blow, up to the yield, and what must become of it after."""


async def play(first: Iterable[Case], blow: Callable[[], Any], last: Iterable[Case] = ()) -> None:
    """Set every case up, strike, and see each one end as it should.

    Args:
        last: cases that do something more, up to their next yield, right before the blow.
    """
    first, last = list(first), list(last)
    try:
        await _onward(first)
        await _onward(last)
        blow()
        await _onward({*first, *last})
    finally:
        for case in {*first, *last}:
            await case.aclose()  # type: ignore[attr-defined]


async def _onward(cases: Iterable[Case]) -> None:
    async with asyncio.TaskGroup() as group:
        for case in cases:
            group.create_task(step(case))


async def step(case: Case) -> None:
    """Go on to a case's next yield, or its end."""
    await anext(case, None)
