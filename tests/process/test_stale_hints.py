"""Official TypeScript clients behind balancers with affinity, when the node that their session ids name leaves.

One client goes through each balancer, before the same nodes: every balancer before every client is the matter of
``test_balancers.py``.
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

from tests.harness.cluster import tables_of
from tests.harness.load import TARGET, ended, typescript
from tests.harness.processes import nodes
from tests.harness.shipped import WITH_AFFINITY, Shipped
from tests.harness.waiting import eventually

LONG = 1.0
LIMIT = 2 * LONG + 5
SOME = 30  # calls


async def test_clients_whose_owner_has_left_go_on_elsewhere(database: str, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    truth.touch()
    env = {"TRUTH": str(truth), "PGMCP_DRAIN_NOTICE": "1", "PGMCP_DRAIN_LIMIT": str(LIMIT)}

    def calls() -> int:
        return len(truth.read_text().splitlines())

    with nodes(TARGET, 3, database_url=database, log_dir=tmp_path, env=env) as members:
        ports = {node.name: node.port for node in members}
        first, second = (Shipped(name, ports, tmp_path / str(n)) for n, name in enumerate(WITH_AFFINITY))
        with first, second:
            async with (
                tables_of(database) as tables,
                typescript("v1", first.mcp_url, tmp_path, LONG) as v1,
                typescript("v2", second.mcp_url, tmp_path, LONG) as v2,
            ):
                await eventually(lambda: calls() >= SOME, "both work", 30)
                owners = {row["node_name"] for row in await tables.rows("select node_name from pgmcp.live_sessions")}
                for owner in [node for node in members if node.name in owners]:
                    owner.signal(signal.SIGTERM)
                    await eventually(lambda: not owner.running, "the owner leaves", LIMIT + 20)  # noqa: B023
                    assert owner.returncode == 0, owner.log[-4000:]
                before = calls()
                await eventually(lambda: calls() >= before + SOME, "both go on", 30)
                rows = await tables.rows("select session_id, node_name from pgmcp.live_sessions")
                assert len(rows) == 2
                assert all(row["session_id"].rpartition("-")[0] in owners for row in rows)
                assert not {row["node_name"] for row in rows} & owners
                saw = [await ended(v1), await ended(v2)]
            exchanges = first.exchanges + second.exchanges
            refused = [each for each in exchanges if each.status not in {200, 202, 204, 499, -1}]
    assert [seen.failures for seen in saw] == [[], []]
    assert refused == []
    for seen in saw:
        assert Counter(seen.told) == Counter(f"test://{text}" for text in seen.texts("announce"))
