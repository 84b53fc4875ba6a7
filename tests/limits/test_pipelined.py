"""Requests that a client sends into one connection without waiting for the answers."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, tables_of
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

CARRIED = "select count(*) from pgmcp.streams where sink is not null"


async def test_a_stream_before_other_requests_ends_with_its_connection(database: str, talker: Talker) -> None:
    """An HTTP server tells only the last exchange of a connection that it is lost."""
    async with (
        cluster(database, talker, 1, keepalive=0.1) as nodes,
        tables_of(database) as tables,
        RawSession() as session,
    ):
        await session.open(nodes[0].url)
        at = urlsplit(nodes[0].url)
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        lines = [f"host: {at.netloc}", f"mcp-session-id: {session.session_id}", "accept: text/event-stream", "", ""]
        request = "\r\n".join(["GET /mcp HTTP/1.1", *lines]).encode()
        writer.write(request + b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"data:")
        assert await tables.value(CARRIED) == 1
        writer.close()
        await writer.wait_closed()

        async def nothing_is_carried() -> bool:
            return not len(nodes[0].incarnation.open_streams) and not await tables.value(CARRIED)

        await eventually(nothing_is_carried, "the exchange ends", 5)
