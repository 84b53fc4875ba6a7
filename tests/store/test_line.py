"""The line: it hears, notices that it is dead, and comes back by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
import uvloop

from pgmcp.clock import Clock, Ids
from pgmcp.cluster.wakeups import PAYLOAD_BYTES
from pgmcp.errors import DatabaseUnavailable
from pgmcp.settings import Settings
from pgmcp.store import nodes
from pgmcp.store.database import Database
from pgmcp.store.line import PROBE, Line, OnReset
from pgmcp.store.notifier import TableNotifier, channel
from pgmcp.types import NodeId, NodeRecord, NodeState
from tests.harness.proxy import proxied
from tests.harness.stores import IDS, store
from tests.harness.waiting import eventually

LINES = "from pg_stat_activity where datname = current_database() and application_name like '% line'"


@dataclass
class Ears:
    """A line, and what it heard."""

    line: Line
    node: NodeId
    heard: list[str] = field(default_factory=list)
    resets: int = 0
    crashes: int = 0
    losses: int = 0
    running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.line.start()
        self.running = asyncio.create_task(self.line.run())

    async def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.wait({self.running})
        await self.line.stop()

    async def until_heard(self, payload: str) -> None:
        async def there() -> bool:
            return payload in self.heard

        await eventually(there, f"{payload} was not heard")

    async def until_resets(self, count: int) -> None:
        async def there() -> bool:
            return self.resets >= count

        await eventually(there, f"no reset number {count}")


def ears(
    address: str,
    node: NodeId | None = None,
    *,
    on_payload: Callable[[str], None] | None = None,
    on_reset: OnReset | None = None,
    **settings: Any,
) -> Ears:
    node = node or NodeId(IDS.uuid())

    heard: list[str] = []

    def reset(*, crashed: bool) -> None:
        found.resets += 1
        found.crashes += crashed

    def lost() -> None:
        found.losses += 1

    given = Settings(database_url=address, **settings)
    line = Line(
        given,
        node,
        Clock(),
        Ids(),
        on_payload=on_payload or heard.append,
        on_broadcast=heard.append,
        on_reset=on_reset or reset,
        on_lost=lost,
        database=Database(given, Clock()),
    )
    found = Ears(line, node, heard)
    return found


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database, timeout=10)
    yield connection
    await connection.close()


@pytest.fixture
async def listening(database: str) -> AsyncIterator[Ears]:
    found = ears(database, deadline=4, trust=12, ttl=20)  # a line that is given up hears nothing meanwhile
    await found.start()
    yield found
    await found.stop()


async def say(hand: asyncpg.Connection, node: NodeId | None, payload: str) -> None:
    await hand.execute("select pg_notify($1, $2)", channel("pgmcp", node), payload)


async def join(address: str, node: NodeId) -> None:
    database = Database(Settings(database_url=address), Clock())
    await database.open()
    await nodes.join(database, NodeRecord(node, "n", "", "0", "0001"))
    await database.close()


async def test_it_hears_its_own_channel_and_everybodys(listening: Ears, hand: asyncpg.Connection) -> None:
    await say(hand, NodeId(IDS.uuid()), "for another")
    await say(hand, None, "for all")
    await say(hand, listening.node, "for me")
    await listening.until_heard("for me")
    assert listening.heard == ["for all", "for me"]
    assert listening.resets == 1


async def test_payloads_come_in_order(listening: Ears, hand: asyncpg.Connection) -> None:
    sent = [f"i{number}" for number in range(1000)]
    for payload in sent:
        await say(hand, listening.node, payload)
    await listening.until_heard(sent[-1])
    heard = set(listening.heard)
    assert listening.heard == [payload for payload in sent if payload in heard]
    assert len(heard) == len(sent) or listening.resets > 1, "a line that was reopened says so"


async def test_a_notifier_reaches_every_line(database: str, listening: Ears) -> None:
    async with store(database) as other:
        notifier = TableNotifier(other.database)
        longest = "s" * PAYLOAD_BYTES
        await notifier.notify([(listening.node, longest), (None, "for all"), (NodeId(IDS.uuid()), "for another")])
        await listening.until_heard("for all")
    assert listening.heard == [longest, "for all"]


@pytest.mark.parametrize(
    "refusal",
    [
        asyncpg.ProgramLimitExceededError("too many notifications in the NOTIFY queue"),
        asyncpg.InternalServerError("could not read block"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_notifier_says_when_postgres_refuses(database: str, refusal: BaseException) -> None:
    async def fetch(*_: object) -> list[asyncpg.Record]:
        raise refusal

    async with store(database) as node:
        node.database.fetch = fetch  # type: ignore[method-assign,assignment]
        with pytest.raises(DatabaseUnavailable):
            await TableNotifier(node.database).notify([(None, "*")])


@pytest.mark.parametrize("schema", ["pgmcp", "a" * 41, "p", "pgmcp_"])
def test_channels_fit_and_differ_by_schema_and_node(schema: str) -> None:
    node, other = NodeId(IDS.uuid()), NodeId(IDS.uuid())
    names = {channel(name, who) for name in (schema, f"{schema[:-1]}z") for who in (node, other, None)}
    assert len(names) == 6
    assert all(len(name.encode()) <= 63 for name in names)


async def test_schemas_of_one_database_do_not_hear_each_other(listening: Ears, hand: asyncpg.Connection) -> None:
    await hand.execute("select pg_notify($1, 'stranger')", channel("other", None))
    await say(hand, None, "friend")
    await listening.until_heard("friend")
    assert listening.heard == ["friend"]


async def test_a_terminated_line_is_reopened_and_hears_again(listening: Ears, hand: asyncpg.Connection) -> None:
    for turn in (2, 3):
        await hand.execute(f"select pg_terminate_backend(pid) {LINES}")
        await listening.until_resets(turn)
        assert listening.line.up
        await say(hand, listening.node, f"after {turn}")
        await listening.until_heard(f"after {turn}")


async def test_the_reset_comes_when_listen_is_in_force(database: str, hand: asyncpg.Connection) -> None:
    """What is stored before the reset is read then; what is stored after it is heard."""
    in_force: list[int] = []
    heard_from: list[asyncio.Task[None]] = []

    def reset(*, crashed: bool) -> None:
        in_force.append(gone.resets)
        heard_from.append(asyncio.ensure_future(say(hand, gone.node, f"at {len(in_force)}")))

    gone = ears(database, on_reset=reset)
    await gone.start()
    try:
        await gone.until_heard("at 1")
        await hand.fetch(f"select pg_terminate_backend(pid) {LINES}")
        await gone.until_heard("at 2")
    finally:
        await gone.stop()


async def test_a_black_hole_is_noticed_in_eight_seconds(database: str, hand: asyncpg.Connection) -> None:
    async with proxied(database) as (proxy, address):
        found = ears(address)
        await found.start()
        try:
            proxy.black_hole = True
            start = time.monotonic()
            await eventually(lambda: found.losses, "the line was not given up")
            assert time.monotonic() - start < 8.5
            proxy.cut_all()
            proxy.black_hole = False
            await found.until_resets(2)
            await say(hand, found.node, "again")
            await found.until_heard("again")
        finally:
            await found.stop()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_lag_of_its_own_loop_loses_no_line(database: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """The answer lies in the socket when the deadline passes: the loop has not looked there."""

    async def scene() -> None:
        found = ears(database, deadline=0.3)
        await join(database, found.node)
        await found.start()
        try:
            assert await found.line.renew()
            for _ in range(5):
                asked = asyncio.create_task(found.line.renew())
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                time.sleep(0.6)  # noqa: ASYNC251 - that is the lag
                assert await asked
            assert (found.losses, found.resets) == (0, 1)
        finally:
            await found.stop()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_lag_of_its_own_loop_fails_no_probe(
    database: str, loop: Callable[[], asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgmcp.store.line.PROBE_SECONDS", 0.01)

    async def scene() -> None:
        found = ears(database, deadline=0.3)
        await found.start()
        try:
            for _ in range(12):
                await asyncio.sleep(0.005)
                time.sleep(0.45)  # noqa: ASYNC251 - beyond the deadline by more than LAG_SECONDS
            assert (found.losses, found.resets) == (0, 1)
        finally:
            await found.stop()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


async def test_a_renewal_gives_a_black_hole_up_at_its_deadline(database: str) -> None:
    async with proxied(database) as (proxy, address):
        found = ears(address)
        await join(database, found.node)
        await found.start()
        try:
            assert await found.line.renew()
            proxy.black_hole = True
            start = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                await found.line.renew()
            assert time.monotonic() - start < 3
        finally:
            await found.stop()


async def test_a_proxy_that_stalls_after_connect_holds_nobody_for_ever(database: str) -> None:
    """River #1251: the connection is made, and then nothing is said."""
    async with proxied(database) as (proxy, address):
        found = ears(address, statement_timeout=1.0)
        proxy.stalling = True
        start = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await found.start()
        assert time.monotonic() - start < 3
        proxy.stalling = False
        await found.start()
        try:
            proxy.stalling = True
            seen = proxy.connected
            proxy.cut_all()

            async def tried_twice() -> bool:
                return proxy.connected >= seen + 2

            await eventually(tried_twice, "the line is not tried again")
            assert not found.line.up
            with pytest.raises(DatabaseUnavailable):
                await found.line.renew()
            proxy.stalling = False
            await found.until_resets(2)
            assert found.line.up
        finally:
            await found.stop()


async def test_a_line_that_is_late_again_and_again_is_not_listened_to(
    database: str, hand: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"LATE": 0.0, "SOON": 0.05, "PROBE": 0.05, "QUIET": 2.0}.items():
        monkeypatch.setattr(f"pgmcp.store.line.{name}_SECONDS", seconds)
    found = ears(database, deadline=4, trust=12, ttl=20)
    await join(database, found.node)
    await found.start()
    try:

        async def deaf() -> bool:
            return found.line.deaf and found.line.up

        await eventually(deaf, "it goes on listening")
        monkeypatch.setattr("pgmcp.store.line.LATE_SECONDS", 4.0)
        await say(hand, found.node, "i0")
        assert await found.line.renew(), "the line itself is well"
        assert found.heard == []

        async def hears() -> bool:
            return not found.line.deaf

        await eventually(hears, "it stays deaf")
        await found.until_resets(3)
        await say(hand, found.node, "i1")
        await found.until_heard("i1")
        assert found.heard == ["i1"]
    finally:
        await found.stop()


async def test_a_line_that_opens_as_a_jam_ends_listens(
    database: str, hand: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgmcp.store.line.QUIET_SECONDS", 0.3)
    found = ears(database, deadline=4, trust=12, ttl=20)
    fetch, slow = asyncpg.Connection.fetch, True
    resets: int | None = None

    def ended() -> bool:
        return resets is not None and found.resets > resets  # a jam's end is one

    async def slowly(self: asyncpg.Connection, query: str, *args: Any, **options: Any) -> Any:
        if slow and "backend_start" in query:
            await eventually(ended, "the jam goes on")
        return await fetch(self, query, *args, **options)

    await found.start()
    try:
        monkeypatch.setattr(asyncpg.Connection, "fetch", slowly)
        flood = "select pg_notify($1, repeat('x', 7000) || n) from generate_series(1, 100) n"
        await hand.execute(flood, channel("pgmcp", None))
        await eventually(lambda: found.line.deaf, "it goes on listening")
        resets = found.resets

        async def hears() -> bool:
            return not found.line.deaf

        await eventually(hears, "it stays deaf")
        slow = False

        async def heard() -> bool:
            await say(hand, found.node, "i1")
            return "i1" in found.heard

        await eventually(heard, "nobody listens, and it does not know before its next probe", 3)
    finally:
        await found.stop()


async def test_a_probe_is_nobodys_payload(listening: Ears, hand: asyncpg.Connection) -> None:
    await say(hand, listening.node, PROBE + "forged")
    await say(hand, listening.node, "i1")
    await listening.until_heard("i1")
    assert listening.heard == ["i1"]


async def test_a_payload_that_the_node_cannot_read_leaves_the_line_up(database: str, hand: asyncpg.Connection) -> None:
    lost = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: lost.append(context))

    def picky(payload: str) -> None:
        if payload == "nonsense":
            raise ValueError(payload)
        found.heard.append(payload)

    found = ears(database, on_payload=picky)
    await found.start()
    try:
        await say(hand, found.node, "nonsense")
        await say(hand, found.node, "sense")
        await found.until_heard("sense")
        assert found.resets == 1
        assert len(lost) == 1
    finally:
        await found.stop()


async def test_renewals_and_states_hit_live_rows_only(database: str, hand: asyncpg.Connection) -> None:
    found = ears(database)
    await found.start()
    try:
        assert not await found.line.renew()
        await join(database, found.node)
        assert await found.line.renew()
        assert await found.line.set_state(NodeState.READY)
        [row] = await hand.fetch("select * from pgmcp.nodes where node_id = $1", found.node)
        [line] = await hand.fetch(f"select pid, backend_start {LINES}")
        assert (row["state"], row["line_pid"], row["line_started_at"]) == ("ready", line["pid"], line["backend_start"])
        await hand.execute("update pgmcp.nodes set state = 'dead'")
        assert not await found.line.renew()
        assert not await found.line.set_state(NodeState.READY)
    finally:
        await found.stop()


async def test_a_renewal_that_postgres_refuses_is_only_a_failed_one(database: str, hand: asyncpg.Connection) -> None:
    found = ears(database)
    await found.start()
    try:
        await hand.execute(
            "create function pgmcp.refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'could not read block' using errcode = 'XX001'; end $$;"
            "create trigger refuse before update on pgmcp.nodes execute function pgmcp.refuse()"
        )
        with pytest.raises(DatabaseUnavailable):
            await found.line.renew()
    finally:
        await found.stop()


@pytest.mark.parametrize("ending", ["close", "lost"])
async def test_nothing_is_left_of_a_closed_line(database: str, hand: asyncpg.Connection, ending: str) -> None:
    found = ears(database)
    await found.start()
    if ending == "lost":
        await hand.fetch(f"select pg_terminate_backend(pid) {LINES}")
    await found.stop()
    await found.stop()
    assert not found.line.up

    async def gone() -> bool:
        count = f"select count(*) {LINES}"
        return bool(await hand.fetchval(count) == 0)

    await eventually(gone, "the backend lives on")
