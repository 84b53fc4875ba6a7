from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything


async def test_calls_reach_the_owner_from_any_node(database: str) -> None:
    async with cluster(database, everything, 3) as nodes, RawSession() as session:
        await session.open(nodes[0].url, nodes[1].url)
        for turn, node in enumerate([*nodes, *nodes], 1):
            result = await session.call_tool(node.url, "count")
            assert result["structuredContent"] == {"result": turn}
