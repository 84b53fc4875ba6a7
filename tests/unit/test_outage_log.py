"""What the log says of trouble: once that, once why, once that it is over, whoever reads only warnings."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pgmcp.cluster.lease import Lease
from pgmcp.errors import DatabaseUnavailable, OtherServer, PgmcpError, SchemaError, SchemaGone
from pgmcp.node.incarnation import Incarnation
from pgmcp.node.supervisor import Supervisor
from pgmcp.service import Faults
from pgmcp.settings import Settings
from pgmcp.trouble import PATIENCE_SECONDS, Trouble
from pgmcp.types import NodeState
from tests.harness.clock import FakeClock, settle

AWAY = DatabaseUnavailable("db/app does not answer (ConnectionRefusedError).")
STARTS = DatabaseUnavailable("db/app does not answer (the database system is starting up).")
GONE = SchemaGone("db/app has no such tables any more.")


class Row:
    """The node's row, while PostgreSQL answers what the test says."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.trouble: PgmcpError | None = None

    async def renew(self) -> float | None:
        if self.trouble is not None:
            raise self.trouble
        return self.clock.now

    async def set_state(self, state: NodeState) -> bool:
        return self.trouble is None


@asynccontextmanager
async def renewing(clock: FakeClock) -> AsyncIterator[tuple[Lease, Row]]:
    row = Row(clock)
    lease = Lease(row, Settings(), clock, lambda: None)
    await lease.start()
    task = asyncio.create_task(lease.run())
    yield lease, row
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.levelno > logging.DEBUG]


async def test_an_outage_is_told_from_its_beginning_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    async with renewing(clock) as (lease, row):
        row.trouble = AWAY
        await clock.advance(6)
        assert said(caplog) == [], "an outage that trust outlives has cost nothing"
        await clock.advance(34)
        row.trouble = STARTS
        await clock.advance(2)
        row.trouble = AWAY
        await clock.advance(3)
        row.trouble = None
        await clock.advance(2)
        assert lease.trusted
    levels, lines = zip(*said(caplog), strict=True)
    assert set(levels) == {"WARNING"}
    begin, unready, another, end = lines
    assert begin.startswith("suspended: PostgreSQL was not reached for 7 s.")
    assert begin.endswith(str(AWAY))
    assert unready.startswith("not ready: suspended for 25 s")
    assert another == f"still suspended: {STARTS}"
    assert end.startswith("trusted again, and ready again: PostgreSQL is back after 38")


async def test_a_schema_that_is_gone_is_an_error_at_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    async with renewing(clock) as (lease, row):
        row.trouble = GONE
        await clock.advance(2)
        assert lease.schema_gone
        row.trouble = None
        await clock.advance(2)
        assert not lease.schema_gone
    assert said(caplog) == [
        ("ERROR", f"the schema is gone, and this node can do nothing without it: {GONE}"),
        ("WARNING", "the schema is there again"),
    ]


@pytest.mark.parametrize(("error", "level"), [(SchemaError("older"), "ERROR"), (OtherServer("theirs"), "WARNING")])
async def test_a_node_that_cannot_join_again_says_why_once(
    error: PgmcpError, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    troubles: list[PgmcpError] = []

    class Stay(Incarnation):
        def __init__(self) -> None:
            self.node_id, self.failed, self.over = "n", False, asyncio.Event()  # type: ignore[assignment]

        async def start(self) -> None:
            if troubles:
                raise troubles[0]

        async def run(self) -> None:
            await self.over.wait()

        async def stop(self) -> None:
            pass

    supervisor = Supervisor(Stay, clock, Faults(), lambda: False)
    await supervisor.start()
    task = asyncio.create_task(supervisor.run())
    await settle()
    troubles.append(error)
    assert supervisor.present is not None
    supervisor.present.over.set()
    await clock.advance(30)
    troubles.clear()
    await clock.advance(1)
    task.cancel()
    levels = [level for level, _ in said(caplog)]
    assert levels == ["INFO", level, "WARNING"]
    assert str(error) in said(caplog)[1][1]
    assert said(caplog)[2][1] == "this node joined again, as n"


async def test_other_trouble_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    trouble = Trouble("the work", clock)
    for _ in range(100):
        trouble.met(PgmcpError("no right"))
    trouble.over()
    trouble.over()
    assert said(caplog) == [
        ("WARNING", "the work fails, and is tried again and again: no right"),
        ("WARNING", "the work works again"),
    ]
    caplog.clear()
    for _ in range(5):  # an outage, of which the lease tells, and others
        trouble.met(AWAY)
        clock.jump(PATIENCE_SECONDS - 1)
        trouble.paused()
    assert said(caplog) == []
    trouble.met(AWAY)
    clock.jump(PATIENCE_SECONDS)
    trouble.met(AWAY)
    assert len(said(caplog)) == 1, "though its lease gets through"
