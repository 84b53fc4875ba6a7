"""One path for small and large messages, and strange ones cost nobody else anything."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any
from uuid import UUID

import pytest

from pgmcp.types import Accepted, Message
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import RunningNode, Tables, cluster
from tests.harness.waiting import eventually
from tests.outages.ledger import Ledger, run, sessions

SIZES = [100, 7_999, 8_000, 1_000_000]
PATH = {"accept", "claim", "append"}
UPDATED = "notifications/resources/updated"


def call(name: str, arguments: str, request_id: int = 1) -> bytes:
    """A call whose arguments are JSON text."""
    text = '{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"%s","arguments":%s}}'
    return (text % (request_id, name, arguments)).encode()


class Statements:
    """What the nodes sent to PostgreSQL, and the payloads of their wake-ups."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self.payloads: list[str] = []

    @contextmanager
    def of(self, node: RunningNode) -> Iterator[None]:
        database = node.database
        fetch = database.fetch

        async def counted(name: str, *args: Any, **more: Any) -> Any:
            self.names[name] += 1
            if name == "notify":
                self.payloads.extend(args[1])
            return await fetch(name, *args, **more)

        database.fetch = counted  # type: ignore[method-assign]  # until the context ends
        try:
            yield
        finally:
            database.fetch = fetch  # type: ignore[method-assign]


async def carried(session: RawSession, base: str, body: bytes) -> tuple[RawExchange, bytes]:
    """POST a call; the exchange and the one message that came, as text."""
    exchange = await session.post(base, body)
    assert exchange.status == 200, exchange.body
    events = await exchange.rest()
    assert exchange.error is None
    (message,) = [event.data for event in events if event.data]
    return exchange, message.encode()


def stream_of(exchange: RawExchange) -> UUID:
    return UUID(str(exchange.last_event_id).partition(".")[0])


@pytest.mark.parametrize("edge", [0, 1], ids=["owner", "other"])
async def test_every_size_takes_the_same_path(database: str, ledger: Ledger, tables: Tables, edge: int) -> None:
    """Hatchet: what is larger than a NOTIFY payload must not go another way."""
    async with cluster(database, ledger.server, 2, poll=30) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        _, empty = await carried(session, nodes[edge].url, call("fill", '{"size":0}', 9))
        paths, ids = [], itertools.count(1)
        for size in SIZES:
            ledger.ran.clear()
            text = "x" * (size - len(call("run", '{"text":""}')))
            asked, told = call("run", json.dumps({"text": text}, separators=(",", ":")), next(ids)), size - len(empty)
            assert len(asked) == size
            for body, ran, answer in (
                (asked, text, text),
                (call("fill", json.dumps({"size": told}), next(ids)), told, "x" * told),
            ):
                statements = Statements()
                with ExitStack() as stack:
                    for node in nodes:
                        stack.enter_context(statements.of(node))
                    exchange, message = await carried(session, nodes[edge].url, body)
                assert json.loads(message)["result"]["content"][0]["text"] == answer
                assert ledger.ran[-1] == ran
                stored = await tables.rows(
                    "select r.body, e.message from pgmcp.requests r join pgmcp.events e on e.stream = r.stream "
                    "where r.stream = $1",
                    stream_of(exchange),
                )
                assert [(row["body"], row["message"]) for row in stored] == [(body, message)]
                assert all(len(payload) < 100 for payload in statements.payloads)
                paths.append({name: statements.names[name] for name in PATH} | {"notify": len(statements.payloads)})
            assert len(message) == size
            assert len(ledger.ran) == 2
        assert paths == [{"accept": 1, "claim": 1, "append": 1, "notify": 2 * edge}] * len(paths)


DEEP = '{"a":' * 90 + "[1.50]" + "}" * 90
STRANGE = {
    "NUL": '{"value":{"a":"x\\u0000y","\\u0000":"\\u0000"}}',
    "numbers": f'{{"value":{{"a":[{2**53 - 1},{2**53 + 1},-{2**53 + 1},{10**30},1e2,0.1,1.0]}}}}',
    "duplicate keys": '{"value":{"a":1,"a":2}, "value": {"a":3,"b":[],"a":4}}',
    "deep": f'{{"value":{DEEP}}}',
    "blanks": '{ "value"\t:\n{"a" : "\\u00e4 \\ud83d\\ude42 ä \\/"} }',
    "separators": '{"value":{"a":"\u2028\u2029\u0085\x7f"}}',
}
REFUSED = {
    "lone surrogate": call("echo", '{"value":{"a":"\\ud800"}}'),
    "half a pair": call("echo", '{"value":{"a":"\\udc00x"}}'),
    "surrogate as key": call("echo", '{"value":{"\\udfff":1}}'),
    "NUL as tool": call("a\\u0000b", "{}"),
    "too deep": call("echo", f'{{"value":{"[" * 101 + "]" * 101}}}'),
}
LONG_NAME = "".join(chr(0x4E00 + number % 20_000) for number in range(100_000))


@asynccontextmanager
async def one_statement(node: RunningNode, name: str, count: int) -> AsyncIterator[list[int]]:
    """Hold the first of these statements until ``count`` rows wait for the next one; gives the sizes of all."""
    inbox, database, sizes, arrived = node.incarnation.inbox, node.database, list[int](), list[int]()
    fetch, accept = database.fetch, inbox.accept

    async def accepted(messages: Sequence[Message]) -> Accepted:
        arrived.append(len(messages))
        return await accept(messages)

    async def held(asked: str, *args: Any, **more: Any) -> Any:
        if asked == name:
            sizes.append(len(args[0]))
            if len(sizes) == 1:
                await eventually(lambda: len(arrived) > count, f"{count} rows wait")
        return await fetch(asked, *args, **more)

    database.fetch = held  # type: ignore[method-assign,assignment]
    inbox.accept = accepted  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        database.fetch = fetch  # type: ignore[method-assign]
        inbox.accept = accept  # type: ignore[method-assign]


@pytest.mark.parametrize("edge", [0, 1], ids=["owner", "other"])
async def test_strange_messages_arrive_unchanged_and_cost_no_neighbour_anything(
    database: str, ledger: Ledger, tables: Tables, edge: int
) -> None:
    async with (
        cluster(database, ledger.server, 2, poll=30) as nodes,
        sessions(nodes[:1], len(STRANGE) + 10) as opened,
        RawSession() as opener,
    ):
        base = nodes[edge].url
        await opener.open(nodes[0].url)
        neighbours, odd, named = opened[:8], opened[8 : 8 + len(STRANGE)], opened[-2:]
        names = [call("no such tool" + LONG_NAME, "{}"), b'{"jsonrpc":"2.0","id":1,"method":"%s"}' % LONG_NAME.encode()]
        async with one_statement(nodes[edge], "accept", len(opened)) as sizes:
            first = asyncio.create_task(run(opener, base, "first"))
            await eventually(lambda: sizes == [1], "the first one is on its way")
            async with asyncio.TaskGroup() as group:
                for number, session in enumerate(neighbours):
                    group.create_task(run(session, base, f"n{number}"))
                strange = [
                    group.create_task(carried(session, base, call("echo", arguments)))
                    for session, arguments in zip(odd, STRANGE.values(), strict=True)
                ]
                long = [
                    group.create_task(carried(session, base, body)) for session, body in zip(named, names, strict=True)
                ]
                refused = [group.create_task(opener.post(base, body)) for body in REFUSED.values()]
            await first
        assert sorted(sizes) == [1, 1, 1, len(opened) - 2], "the two long ones go alone"
        assert [(exchange.result().status, name) for exchange, name in zip(refused, REFUSED, strict=True)] == [
            (400, name) for name in REFUSED
        ]
        for task, body in zip(
            [*strange, *long], [*(call("echo", text) for text in STRANGE.values()), *names], strict=True
        ):
            exchange, message = task.result()
            row = await tables.rows(
                "select body, message from pgmcp.requests r join pgmcp.events e using (stream) where stream = $1",
                stream_of(exchange),
            )
            assert [tuple(found) for found in row] == [(body, message)]
        values = [json.loads(text)["value"] for text in STRANGE.values()]
        assert [json.loads(task.result()[1])["result"]["structuredContent"] for task in strange] == values
        assert sorted(ledger.ran) == sorted(["first", *(f"n{number}" for number in range(8)), *map(repr, values)])


@pytest.mark.parametrize("edge", [0, 1], ids=["owner", "other"])
async def test_a_result_that_is_no_text_is_its_own_callers_trouble(database: str, ledger: Ledger, edge: int) -> None:
    async with cluster(database, ledger.server, 2, poll=30) as nodes, sessions(nodes[:1], 5) as opened:
        base = nodes[edge].url
        async with asyncio.TaskGroup() as group:
            bad = group.create_task(carried(opened[0], base, call("broken", '{"kind":"surrogate"}')))
            for number, session in enumerate(opened[1:]):
                group.create_task(run(session, base, f"n{number}"))
        answer = json.loads(bad.result()[1])
        assert "error" in answer or answer["result"]["isError"]
        await run(opened[0], base, "after")
        assert len(ledger.ran) == 6


async def test_updates_of_two_long_uris_are_two(database: str, ledger: Ledger) -> None:
    """G12: what waits is coalesced by method and uri, and a long uri is a uri."""
    uris = [f"test://{'x' * 600}/{number}" for number in (1, 2)]
    async with cluster(database, ledger.server, 2, poll=30) as nodes, RawSession() as session:
        await session.open(nodes[0].url)
        await session.call_tool(nodes[1].url, "update", uris=uris)
        standalone = await session.get(nodes[1].url)
        found = [(await standalone.message(UPDATED, 3))["params"]["uri"] for _ in uris]
        assert found == uris
