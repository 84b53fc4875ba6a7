"""Any weather, any order: what must never happen to a cluster, looked for by hypothesis.

Everything is the product's own but the database (``tests/harness/memory``, held to the ports by ``tests/ports``), the
server and the edge. Time stands still but for the rules that move it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.harness.clock import FakeClock, StillLoop, settle
from tests.harness.proxy import Cut
from tests.property.nodes import SimNode
from tests.property.profiles import chosen
from tests.property.world import Call, SimSession, World

pytestmark = pytest.mark.timeout(400)  # its end are its examples, however busy the machine is

NODES = 3
MOST_NODES, MOST_SESSIONS, MOST_CALLS = 8, 2, 12

numbers = st.integers(0, MOST_NODES - 1)
moments = st.sampled_from([0.1, 0.4, 1.0, 2.5, 6.0, 8.0, 11.0, 20.0])
outages = st.sampled_from([3.0, 12.0, 40.0, 70.0])
freezes = st.sampled_from([2.0, 8.0, 12.0, 20.0])
owners = st.sampled_from(
    ["append", "claim", "append", "claim", "adopt", "end_restore", "begin_restore", "write_journal"]
)
windows = st.sampled_from([0.1, 0.4, 1.0, 3.0])
promotions = st.sampled_from([0.0, 0.3, 3.0, 12.0])
claims = st.integers(0, 2)
paces = st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.4]), max_size=7)
lengths = st.sampled_from([0.0, 1.0, 5.0, 15.0, 60.0])
statements = st.sampled_from(
    ["accept", "claim", "append", "renew", "condemn", "take_session", "take_orphans", "begin_restore", "adopt",
     "end_restore", "establish", "write_journal", "unclaimed", "notify", "inherited_requests"]
)  # fmt: skip
delayed = st.sampled_from(
    [
        "accept",
        "append",
        "renew",
        "take_session",
        "adopt",
        "establish",
        "write_journal",
        "condemn",
        "claim",
        "put_back",
        "end_restore",
        "begin_restore",
        "open_session",
        "attach",
    ]
)


class Cluster(RuleBasedStateMachine):
    """Three nodes and up to two sessions."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.loop = StillLoop(self.clock)
        self.world: World

    @initialize()
    def cluster_starts(self) -> None:
        async def start() -> None:
            self.world = World(self.clock, NODES)
            await self.clock.advance(1)
            session = self.world.open_session(self.world.nodes[0])
            await self.clock.advance(1)
            self.world.call_tool(session, self.world.nodes[1], safe=True, seconds=60.0)
            self.world.call_tool(session, self.world.nodes[2], safe=False, seconds=12.0)
            await self.clock.advance(1)

        self.loop.run_until_complete(start())

    def _settle(self) -> None:
        self.loop.run_until_complete(settle())

    def _node(self, number: int) -> SimNode:
        return self.world.nodes[number % len(self.world.nodes)]

    def _session(self, number: int) -> SimSession:
        return self.world.sessions[number % len(self.world.sessions)]

    def _call(self, number: int) -> Call:
        return self.world.calls[number % len(self.world.calls)]

    def _living(self) -> int:
        return sum(node.alive for node in self.world.nodes)

    # -- clients -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.world.sessions) < MOST_SESSIONS)
    @rule(node=numbers)
    def client_opens_a_session(self, node: int) -> None:
        if self._node(node).alive:
            self._do(lambda: self.world.open_session(self._node(node)))

    @precondition(lambda self: len(self.world.calls) < MOST_CALLS)
    @rule(session=numbers, node=numbers, seconds=lengths)
    def client_calls_a_safe_tool(self, session: int, node: int, seconds: float) -> None:
        self._call_a_tool(session, node, seconds, safe=True)

    @precondition(lambda self: len(self.world.calls) < MOST_CALLS)
    @rule(session=numbers, node=numbers, seconds=lengths)
    def client_calls_an_unsafe_tool(self, session: int, node: int, seconds: float) -> None:
        self._call_a_tool(session, node, seconds, safe=False)

    def _call_a_tool(self, session: int, node: int, seconds: float, *, safe: bool) -> None:
        where = self._session(session)
        if self._node(node).alive and where.established:
            self._do(lambda: self.world.call_tool(where, self._node(node), safe=safe, seconds=seconds))

    @precondition(lambda self: self.world.calls)
    @rule(call=st.integers(0, MOST_CALLS - 1), node=numbers)
    def client_repeats_a_post(self, call: int, node: int) -> None:
        if self._node(node).alive:
            self._do(lambda: self.world.post(self._call(call), self._node(node)))

    @precondition(lambda self: self.world.calls)
    @rule(call=st.integers(0, MOST_CALLS - 1), node=numbers)
    def client_cancels_a_call(self, call: int, node: int) -> None:
        which = self._call(call)
        if self._node(node).alive and which.acknowledged:
            params: dict[str, object] = {"requestId": int(which.rpc_id)}
            self._do(lambda: self.world.notify(which.session, self._node(node), "notifications/cancelled", params))

    @rule(session=numbers, node=numbers)
    def client_says_that_it_is_initialized(self, session: int, node: int) -> None:
        where = self._session(session)
        if self._node(node).alive and where.established:
            self._do(lambda: self.world.notify(where, self._node(node), "notifications/initialized", {}))

    @precondition(lambda self: self.world.calls)
    @rule(call=st.integers(0, MOST_CALLS - 1), node=numbers)
    def client_resumes_a_stream(self, call: int, node: int) -> None:
        if self._node(node).alive and self._call(call).acknowledged:
            self._do(lambda: self.world.resume(self._call(call), self._node(node)))

    # -- nodes ---------------------------------------------------------------------------------------------------------

    @rule(node=numbers)
    def node_freezes(self, node: int) -> None:
        self._do(self._node(node).clock.freeze)

    @precondition(lambda self: any(node.clock.frozen for node in self.world.nodes))
    @rule(node=numbers)
    def node_thaws(self, node: int) -> None:
        which = self._node(node)
        if not which.gone and which.clock.frozen:
            self._do(which.thaw)

    @rule(session=numbers, statement=owners, where=st.sampled_from([Cut.BEFORE, Cut.AFTER]), seconds=freezes)
    def owner_will_freeze_in_the_middle_of(self, session: int, statement: str, where: Cut, seconds: float) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            which.store.wire.during(statement, where, lambda: which.stand_still(seconds))

    @rule(session=numbers, seconds=freezes)
    def owner_freezes_for(self, session: int, seconds: float) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            self._do(lambda: which.stand_still(seconds))

    @rule(session=numbers, statement=delayed, seconds=st.sampled_from([1.0, 8.0, 12.0, 20.0]))
    def owner_writes_late(self, session: int, statement: str, seconds: float) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            which.store.wire.delay(statement, seconds)

    @rule(session=numbers)
    def owner_dies(self, session: int) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            if self._living() == 1:
                self._do(self.world.start_node)
            self._do(which.die)

    @rule(session=numbers, seconds=st.sampled_from([1.0, 8.0, 12.0]))
    def owner_has_to_look_up_a_key(self, session: int, seconds: float) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            which.keys.takes = seconds

    @precondition(lambda self: self._living() > 1)
    @rule(node=numbers)
    def node_dies(self, node: int) -> None:
        if self._node(node).alive:
            self._do(self._node(node).die)

    @rule(session=numbers, node=numbers, busy=st.booleans())
    def owner_gives_a_session_away(self, session: int, node: int, busy: bool) -> None:
        where, to = self._session(session), self._node(node)
        which = self.world.owner(where)
        if which is not None and which is not to and to.alive:
            self._do(lambda: self.world.spawn(self.world.give_away(where, which, to, busy=busy)))

    @precondition(lambda self: self._living() > 1)
    @rule(node=numbers)
    def node_leaves(self, node: int) -> None:
        which = self._node(node)
        if which.alive and not which.clock.frozen:
            self._do(lambda: self.world.spawn(which.leave()))

    @precondition(lambda self: len(self.world.nodes) < MOST_NODES)
    @rule()
    def node_starts(self) -> None:
        self._do(self.world.start_node)

    @rule(node=numbers)
    def node_loses_its_line(self, node: int) -> None:
        self._do(self._node(node).lose_line)

    @rule(node=numbers)
    def node_is_cut_off(self, node: int) -> None:
        which = self._node(node)
        which.store.wire.is_cut = True
        self._do(which.notice_lost_line)

    @precondition(lambda self: any(node.store.wire.is_cut for node in self.world.nodes))
    @rule(node=numbers)
    def node_reaches_the_database_again(self, node: int) -> None:
        which = self._node(node)
        if which.store.wire.is_cut:
            which.store.wire.is_cut = False
            which.recovered()

    # -- the database --------------------------------------------------------------------------------------------------

    @rule(keeps_lines=st.booleans())
    def database_goes_away(self, keeps_lines: bool) -> None:
        self._do(lambda: self.world.database_goes_away(keeps_lines=keeps_lines))

    @rule(seconds=outages, keeps_lines=st.booleans())
    def database_is_away_for(self, seconds: float, keeps_lines: bool) -> None:
        self.loop.run_until_complete(self.world.database_is_away(seconds, keeps_lines=keeps_lines))
        self.world.check()

    @rule(session=numbers, statement=owners, where=st.sampled_from([Cut.BEFORE, Cut.AFTER]), seconds=outages)
    def database_will_be_away_in_the_middle_of(self, session: int, statement: str, where: Cut, seconds: float) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            which.store.wire.during(statement, where, lambda: self.world.go_away_for(seconds))

    @rule()
    def database_crashes(self) -> None:
        self._do(self.world.crash)

    @rule(session=numbers, statement=owners, where=st.sampled_from([Cut.BEFORE, Cut.AFTER]))
    def database_will_crash_in_the_middle_of(self, session: int, statement: str, where: Cut) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            which.store.wire.during(statement, where, self.world.crash)

    @rule(away=promotions, claims=claims, paces=paces)
    def synchronous_standby_is_promoted(self, away: float, claims: int, paces: list[float]) -> None:
        self._do(lambda: self.world.spawn(self.world.fails_over(away, claims=claims, paces=paces)))

    @rule(session=numbers, statement=owners, where=st.sampled_from([Cut.BEFORE, Cut.AFTER]), claims=claims, paces=paces)
    def synchronous_standby_will_be_promoted_in_the_middle_of(
        self, session: int, statement: str, where: Cut, claims: int, paces: list[float]
    ) -> None:
        which = self.world.owner(self._session(session))
        if which is not None:
            fail_over = lambda: self.world.fail_over(claims=claims, paces=paces)  # noqa: E731
            which.store.wire.during(statement, where, fail_over)

    @rule(seconds=windows, away=promotions, claims=claims, paces=paces)
    def standby_falls_behind_and_is_promoted(
        self, seconds: float, away: float, claims: int, paces: list[float]
    ) -> None:
        self._do(lambda: self.world.falls_behind(seconds, away, claims=claims, paces=paces))

    @precondition(lambda self: self.world.cluster.away)
    @rule()
    def database_comes_back(self) -> None:
        self.world.cluster.away = False

    @rule(seconds=st.sampled_from([-5.0, 1.0, 3.0, 6.0, 9.0, 12.0, 3600.0]))
    def database_clock_jumps(self, seconds: float) -> None:
        self.world.cluster.shift += seconds

    @rule(node=numbers, statement=statements, where=st.sampled_from([Cut.BEFORE, Cut.AFTER]))
    def statement_meets_a_broken_connection(self, node: int, statement: str, where: Cut) -> None:
        self._node(node).store.wire.cut(statement, where)

    @rule(statement=statements, where=st.sampled_from([Cut.BEFORE, Cut.AFTER]))
    def every_node_meets_a_broken_connection(self, statement: str, where: Cut) -> None:
        for node in self.world.nodes:
            node.store.wire.cut(statement, where)

    @rule(node=numbers, statement=delayed, seconds=moments)
    def statement_commits_late(self, node: int, statement: str, seconds: float) -> None:
        self._node(node).store.wire.delay(statement, seconds)

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.0]))
    def a_moment_passes(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(seconds=st.sampled_from([2.5, 5.0, 8.0]))
    def seconds_pass(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(seconds=st.sampled_from([11.0, 20.0, 30.0, 70.0]))
    def a_while_passes(self, seconds: float) -> None:
        self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        self.loop.run_until_complete(self.clock.advance(seconds))
        self.world.check()

    # ------------------------------------------------------------------------------------------------------------------

    def _do(self, what: object) -> None:
        async def do() -> None:
            what()  # type: ignore[operator]
            await settle()

        self.loop.run_until_complete(do())
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            self.loop.close()
            return
        try:
            self.loop.run_until_complete(self.world.clear_up())
            self.world.check_end()
        finally:
            self.loop.run_until_complete(self.world.close())
            self.loop.close()


@pytest.fixture
def quiet() -> Iterator[None]:
    """Thousands of takeovers are not worth a line each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_any_weather() -> None:
    run_state_machine_as_test(Cluster, settings=chosen())
