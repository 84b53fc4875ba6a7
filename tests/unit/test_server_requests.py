"""Requests of the server to the client: ids that no other actor's answer can hit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pgmcp.clock import Ids
from pgmcp.session.server_requests import ACTORS, STEP, ServerRequests

JS_SAFE = 2**53 - 1


class FixedIds(Ids):
    def __init__(self, number: int) -> None:
        self._number = number

    def number(self, below: int) -> int:
        return min(self._number, below - 1)


def ask(server_requests: ServerRequests, own: Any, **params: Any) -> dict[str, Any]:
    message = {"jsonrpc": "2.0", "id": own, "method": "elicitation/create", "params": params}
    return dict(json.loads(server_requests.ask(json.dumps(message).encode())))


def answer(server_requests: ServerRequests, wire: Any) -> Any:
    answered = server_requests.answer({"jsonrpc": "2.0", "id": wire, "result": {}})
    return None if answered is None else json.loads(answered)["id"]


@pytest.mark.parametrize("own", [0, 1, "1", "a"])
def test_an_answer_comes_back_under_the_servers_own_id(own: Any) -> None:
    server_requests = ServerRequests(Ids())
    wire = ask(server_requests, own)["id"]
    assert wire != own
    assert answer(server_requests, wire) == own
    assert answer(server_requests, wire) is None


def test_a_late_answer_to_a_dead_actor_answers_nobody() -> None:
    """Both actors ask their first question; the dialogs look alike."""
    dead, new = ServerRequests(FixedIds(5)), ServerRequests(FixedIds(6))
    late, current = ask(dead, 1)["id"], ask(new, 1)["id"]
    assert answer(new, late) is None
    assert answer(new, current) == 1


@pytest.mark.parametrize("drawn", [0, 1, ACTORS])
def test_ids_are_safe_in_javascript_and_stay_in_their_actors_range(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(ServerRequests(FixedIds(drawn)), 0)["id"]
    assert first - first % STEP > 0
    assert first - first % STEP + STEP <= JS_SAFE, "the last one, too"
    monkeypatch.setattr("pgmcp.session.server_requests.STEP", 4)
    server_requests = ServerRequests(FixedIds(drawn))
    wires = [ask(server_requests, own)["id"] for own in range(6)]
    assert len(set(wires)) == 4, "they begin anew"
    assert len({wire // 4 for wire in wires}) == 1


def test_a_progress_token_goes_along_both_ways() -> None:
    server_requests = ServerRequests(Ids())
    asked = ask(server_requests, 4, _meta={"progressToken": 4})
    assert asked["params"]["_meta"]["progressToken"] == asked["id"]
    note = {
        "jsonrpc": "2.0",
        "method": "notifications/progress",
        "params": {"progressToken": asked["id"], "progress": 1},
    }
    translated = server_requests.progress(note)
    assert translated is not None
    assert json.loads(translated)["params"] == {"progressToken": 4, "progress": 1}


def test_a_token_of_the_servers_own_choice_stays() -> None:
    server_requests = ServerRequests(Ids())
    assert ask(server_requests, 4, _meta={"progressToken": "mine"})["params"]["_meta"]["progressToken"] == "mine"


def test_a_cancelled_question_cannot_be_answered() -> None:
    server_requests = ServerRequests(Ids())
    wire = ask(server_requests, 1)["id"]
    note = json.dumps({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}).encode()
    cancelled = server_requests.cancel(note)
    assert cancelled is not None
    assert json.loads(cancelled)["params"]["requestId"] == wire
    assert answer(server_requests, wire) is None
    assert server_requests.cancel(note) is None


@pytest.mark.parametrize("wire", [None, 1, -1, "1", 1.5, [], {}, True, 2**70])
def test_answers_to_nothing_are_nothing(wire: Any) -> None:
    server_requests = ServerRequests(Ids())
    ask(server_requests, 1)
    assert answer(server_requests, wire) is None
    assert server_requests.progress({"params": {"progressToken": wire}}) is None
    assert server_requests.progress({}) is None


def test_text_survives() -> None:
    server_requests = ServerRequests(Ids())
    assert ask(server_requests, 1, message="\N{SNOWMAN} \0 \ud800")["params"]["message"] == "\N{SNOWMAN} \0 \ud800"
