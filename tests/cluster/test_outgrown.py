"""A node whose build the database has left behind says so, and does not come back into the cluster."""

from __future__ import annotations

import httpx

from tests.harness.cluster import RunningNode, cluster, everything, tables_of
from tests.harness.waiting import eventually


async def readiness(node: RunningNode) -> tuple[int, str]:
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        answer = await http.get(f"{node.url}/readyz")
        return answer.status_code, answer.json()["status"]


async def test_a_running_node_learns_that_the_database_needs_a_newer_build(database: str) -> None:
    async with cluster(database, everything, 1, idle_poll=0.1) as [node], tables_of(database) as tables:

        async def is_(*wanted: object) -> bool:
            return await readiness(node) == wanted

        assert await is_(200, "ready")
        await tables.execute("update pgmcp.schema_range set needs = '9999'")
        await eventually(lambda: is_(503, "schema"), "the node has learnt of it")
        first = node.incarnation.node_id
        await tables.execute("update pgmcp.nodes set state = 'dead'")
        await eventually(lambda: node.present is None, "the node is fenced")
        await eventually(lambda: is_(503, "schema"), "it may not join again")
        assert await tables.value("select count(*) from pgmcp.nodes") == 1
        await tables.execute("update pgmcp.schema_range set needs = '0001'")
        await eventually(lambda: is_(200, "ready"), "it joins as soon as it fits")
        assert node.incarnation.node_id != first
