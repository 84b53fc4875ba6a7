"""Rounds of one call on different nodes (2026-07-28): the state that clients carry is sealed by one node for all."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import subprocess
import sys
from typing import Any

import pytest
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.request_state import AESGCMRequestStateCodec, RequestStateSecurity
from mcp_types import ElicitRequest, ElicitRequestFormParams, ElicitResult, InputRequiredResult

from pgmcp.store.encryption.key_rings import KeyRing
from tests.cluster.test_identity import bearer, server
from tests.harness.clients import Message
from tests.harness.cluster import RunningNode, cluster, tables_of
from tests.harness.modern import Modern
from tests.harness.proxy import proxied
from tests.harness.waiting import eventually

ROUNDS = 4
OWN = "a key that somebody has chosen, of 32 characters"


def rounds(**options: Any) -> MCPServer:
    """A server whose one tool asks four times and keeps what it knows in the state that its client carries."""
    made = MCPServer(options.pop("name", "rounds"), **options)
    made.tool()(add_up)
    return made


def add_up(ctx: Context, start: int) -> str | InputRequiredResult:
    """Ask for numbers and add them up."""
    seen = json.loads(ctx.request_state) if ctx.request_state else [start]
    answer = (ctx.input_responses or {}).get("number")
    if isinstance(answer, ElicitResult) and answer.content:
        seen.append(answer.content["number"])
    if len(seen) > ROUNDS:
        return str(sum(seen))
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    form = ElicitRequest(params=ElicitRequestFormParams(message="A number?", requested_schema=schema))
    return InputRequiredResult(input_requests={"number": form}, request_state=json.dumps(seen))


async def play(client: Modern, bases: itertools.cycle[str], start: int) -> Message:
    """All rounds of one call, each on the next node; the last answer."""
    state: dict[str, Any] = {}
    for number in range(ROUNDS + 1):
        answer = await once(client, next(bases), start, number, state)
        if answer.get("result", {}).get("resultType") != "input_required":
            break
        state = {"requestState": answer["result"]["requestState"]}
    return answer


async def once(client: Modern, base: str, start: int, number: int, state: dict[str, Any]) -> Message:
    answers = {"inputResponses": {"number": {"action": "accept", "content": {"number": number}}}} if state else {}
    return await client.call(base, "tools/call", {"name": "add_up", "arguments": {"start": start}, **answers, **state})


def sums_up(answer: Message, start: int) -> bool:
    return bool(answer["result"]["content"][0]["text"] == str(start + sum(range(1, ROUNDS + 1))))


def refused(answer: Message) -> bool:
    return bool(answer.get("error", {}).get("data") == {"reason": "invalid_request_state"})


async def test_each_round_on_another_node(database: str) -> None:
    async with cluster(database, rounds, 3) as nodes, tables_of(database) as tables, Modern() as client:
        before = await tables.counts()
        bases = itertools.cycle([node.url for node in nodes])
        answers = [await play(client, bases, start) for start in range(100)]
        assert sum(sums_up(answer, start) for start, answer in enumerate(answers)) == 100
        assert await tables.counts() == before


async def test_across_a_change_of_keys_and_a_restart_of_all_nodes(database: str) -> None:
    """Every state of before is brought to nodes that were not there when it was sealed."""
    async with tables_of(database) as tables, Modern() as client:
        sealed: list[tuple[int, str]] = []
        keys: set[int] = set()
        for generation in range(4):
            async with cluster(database, rounds, 2, key_rotation=3600) as nodes:
                bases = itertools.cycle([node.url for node in nodes])
                for start, state in sealed:
                    answer = await once(client, next(bases), start, 1, {"requestState": state})
                    assert answer["result"]["resultType"] == "input_required", answer
                answer = await once(client, next(bases), generation, 0, {})
                sealed.append((generation, answer["result"]["requestState"]))
                keys |= nodes[0].node.states.key_ids
                await tables.execute("update pgmcp.secrets set created_at = created_at - interval '2 hours'")
                for node in nodes:  # makes the next key, which is not ripe: the older one still seals
                    await node.node.states.load()
                assert sums_up(await play(client, bases, 7), 7)
        assert len(keys) == 4


async def test_a_node_that_has_not_read_the_newest_key_asks_for_it(database: str) -> None:
    async with cluster(database, rounds, 2) as nodes, tables_of(database) as tables, Modern() as client:
        await tables.execute("update pgmcp.secrets set created_at = created_at - interval '31 days'")
        await nodes[0].node.states.load()
        await tables.execute("update pgmcp.secrets set created_at = created_at - interval '1 hour'")
        await nodes[0].node.states.load()
        assert len(nodes[0].node.states.key_ids) == 2
        assert len(nodes[1].node.states.key_ids) == 1
        assert sums_up(await play(client, itertools.cycle([node.url for node in nodes]), 3), 3)


async def test_nodes_read_the_ring_anew_by_themselves(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgmcp.node.node.REFRESH_SECONDS", 0.1)
    async with cluster(database, rounds, 2) as nodes, tables_of(database) as tables:
        await tables.execute("update pgmcp.secrets set created_at = created_at - interval '31 days'")
        for node in nodes:
            for ring in (node.node.states, node.node.box):

                def newer(ring: KeyRing = ring) -> bool:
                    return len(ring.key_ids) == 2

                await eventually(newer, "the next key is there")
        assert await tables.value("select count(*) from pgmcp.secrets") == 4, "made once for each ring"


async def test_what_was_changed_borrowed_or_made_up_is_refused(database: str) -> None:
    async with cluster(database, rounds, 2) as nodes, Modern() as client:
        state = (await once(client, nodes[0].url, 1, 0, {}))["result"]["requestState"]
        changed = [state[:-2] + ("AA" if state[-2:] != "AA" else "BB"), state[:-9], f"{state}A", f"v1.{state[7:]}",
                   "pgmcp1.", "pgmcp1.\xe9", "x", ""]  # fmt: skip
        for bad in changed:
            assert refused(await once(client, nodes[1].url, 1, 1, {"requestState": bad})), bad
        assert refused(await once(client, nodes[1].url, 2, 1, {"requestState": state})), "other arguments"
        good = await once(client, nodes[1].url, 1, 1, {"requestState": state})
        assert good["result"]["resultType"] == "input_required"


async def test_a_state_belongs_to_its_caller(database: str) -> None:
    def private() -> MCPServer:
        made = server()
        made.tool()(add_up)
        return made

    async with cluster(database, private, 2) as nodes, Modern(bearer("ada")) as ada, Modern(bearer("eve")) as eve:
        state = {"requestState": (await once(ada, nodes[0].url, 1, 0, {}))["result"]["requestState"]}
        assert refused(await once(eve, nodes[1].url, 1, 1, state))
        assert (await once(ada, nodes[1].url, 1, 1, state))["result"]["resultType"] == "input_required"


async def test_a_state_is_used_once_where_that_is_wanted(database: str) -> None:
    async with cluster(database, rounds, 2, single_use_states=True) as nodes, Modern() as client:
        bases = itertools.cycle([node.url for node in nodes])
        assert sums_up(await play(client, bases, 5), 5)
        for _ in range(10):
            state = {"requestState": (await once(client, nodes[0].url, 1, 0, {}))["result"]["requestState"]}
            answers = await asyncio.gather(*(once(client, node.url, 1, 1, state) for node in (*nodes, *nodes)))
            assert sum(refused(answer) for answer in answers) == 3
            assert sum("result" in answer for answer in answers) == 1
        # what fails the other checks does not count as a use
        state = {"requestState": (await once(client, nodes[0].url, 1, 0, {}))["result"]["requestState"]}
        assert refused(await once(client, nodes[0].url, 2, 1, state))
        assert "result" in await once(client, nodes[0].url, 1, 1, state)


async def test_states_are_sealed_and_opened_while_the_database_is_away(database: str) -> None:
    async with proxied(database) as (proxy, way), cluster(way, rounds, 2) as nodes, Modern() as client:
        proxy.refusing = True
        proxy.cut_all()
        assert sums_up(await play(client, itertools.cycle([node.url for node in nodes]), 5), 5)
        unknown = f"pgmcp1.{'A' * 80}"
        nodes[0].database.settings = nodes[0].node.settings.model_copy(update={"statement_timeout": 0.3})
        answer = await once(client, nodes[0].url, 1, 1, {"requestState": unknown})
        assert answer["error"]["code"] == -32603, "nobody can say now whether it is good"
        proxy.refusing = False


async def test_keys_that_a_server_brings_are_kept_and_the_log_says_so(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pgmcp")

    def own() -> MCPServer:
        return rounds(request_state_security=RequestStateSecurity(keys=[OWN]))

    async with cluster(database, own, 2) as nodes, Modern() as client:
        state = (await once(client, nodes[0].url, 1, 0, {}))["result"]["requestState"]
        assert json.loads(AESGCMRequestStateCodec([OWN]).unseal(state))["s"] == "[1]"
        assert sums_up(await play(client, itertools.cycle([node.url for node in nodes]), 5), 5)
    assert sum("requestState security of its own" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("names", [("one", "another"), ("", "")])
async def test_the_audience_is_the_same_on_all_nodes(database: str, names: tuple[str, str]) -> None:
    waiting = iter(names)
    async with cluster(database, lambda: rounds(name=next(waiting)), 2, cluster="rounds") as nodes, Modern() as client:
        assert sums_up(await play(client, itertools.cycle([node.url for node in nodes]), 5), 5)


async def test_the_served_object_stays_as_it_is(database: str) -> None:
    made = rounds()
    before = list(made.middleware)
    async with cluster(database, lambda: made, 1) as [node]:
        await served(node)
    assert list(made.middleware) == before


async def served(node: RunningNode) -> None:
    async with Modern() as client:
        answer = await eventually(lambda: once(client, node.url, 1, 0, {}), "an answer")
    assert answer["result"]["requestState"].startswith("pgmcp1.")


MADE_FIRST = """
from mcp.server.mcpserver import MCPServer
from mcp.server.request_state import RequestStateBoundary, RequestStateSecurity

early = MCPServer("early")
import pgmcp.session.sdk.states as states

late, own = MCPServer("late"), MCPServer("own", request_state_security=RequestStateSecurity(keys=["k" * 32]))
for server in (early, late, own):
    server.streamable_http_app()
    low = server.session_manager.app
    shared = states.with_shared_states(low, None, once=False)
    print(server.name, any(isinstance(each, states.SharedStates) for each in shared))
"""


def test_a_server_that_was_made_before_pgmcp_was_imported_shares_its_states_too() -> None:
    found = subprocess.run([sys.executable, "-c", MADE_FIRST], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.splitlines() == ["early True", "late True", "own False"]
