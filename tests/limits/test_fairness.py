"""A session that floods a node holds up nobody else's (``tests/unit/test_turns.py`` has the rules)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

from pgmcp.types import Accepted, Message, RequestKey
from pgmcp.web.admission import SHARE, SLOTS
from tests.harness.clients import RawSession
from tests.harness.cluster import RunningNode, cluster
from tests.harness.waiting import eventually
from tests.limits.conftest import Talker

LONG = 3600.0


@contextlib.contextmanager
def gate(node: RunningNode, session: RawSession | str) -> Iterator[Callable[[], int]]:
    """Requests of one session stay in acceptance, and keep their slots, until the context ends."""
    inbox, admission, opened = node.incarnation.inbox, node.incarnation.edge.admission, asyncio.Event()
    inside: set[RequestKey] = set()
    accept = inbox.accept
    gated = session if isinstance(session, str) else session.session_id

    async def accept_later(messages: Sequence[Message]) -> Accepted:
        if messages[0].session_id == gated and messages[0].rpc_id is not None:
            inside.add(messages[0].key)
            await opened.wait()
        return await accept(messages)

    admission.young = LONG
    inbox.accept = accept_later  # type: ignore[method-assign]  # until the context ends
    try:
        yield lambda: len(inside)
    finally:
        opened.set()
        inbox.accept = accept  # type: ignore[method-assign]


async def test_others_get_through_beside_a_flood(database: str, talker: Talker) -> None:
    async with cluster(database, talker, 2) as nodes, RawSession() as flood, RawSession() as other:
        await flood.open(nodes[0].url)
        await other.open(nodes[1].url)
        assert (await other.call(nodes[0].url, "ping"))["result"] == {}
        admission = nodes[0].incarnation.edge.admission
        with gate(nodes[0], flood) as inside:
            calls = [asyncio.create_task(flood.call(nodes[0].url, "ping")) for _ in range(50)]
            await eventually(lambda: len(admission) == 50 - SHARE, "the flood waits")
            for node in nodes:  # where the flood is, and where it is not
                assert (await other.call(node.url, "ping"))["result"] == {}
            assert (await flood.notify(nodes[0].url, "notifications/x")).status == 202
            assert (await flood.call(nodes[1].url, "ping"))["result"] == {}
            assert (inside(), len(admission)) == (SHARE, 50 - SHARE)
            for call in calls[-10:]:
                call.cancel()  # hangs up
            await eventually(lambda: len(admission) <= 50 - SHARE - 10, "those that hung up have gone")
        answers = await asyncio.gather(*calls[:-10])
        assert all(answer["result"] == {} for answer in answers)
        await eventually(lambda: admission.free == SLOTS, "every slot is back")


async def test_others_get_through_beside_a_flood_over_http_sse(database: str, talker: Talker) -> None:
    async with cluster(database, talker, 1) as nodes, RawSession(path="/sse") as older, RawSession() as other:
        [node] = nodes
        await other.open(node.url)
        stream = await older.get(node.url)
        older.path, ids = str((await stream.event()).data), itertools.count(1)
        admission = node.incarnation.edge.admission
        with gate(node, older.path.partition("=")[2]) as inside:
            posts = [asyncio.create_task(older.request(node.url, "ping", request_id=next(ids))) for _ in range(50)]
            await eventually(lambda: len(admission) == 50 - SHARE, "the flood waits")
            assert (await other.call(node.url, "ping"))["result"] == {}
            assert inside() == SHARE
        assert {post.status for post in await asyncio.gather(*posts)} == {202}
        await eventually(lambda: admission.free == SLOTS, "every slot is back")
