"""The journal: which messages are kept, and what the handshake settled."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgmcp.session.journal import handshake, journal_entries
from pgmcp.types import JournalEntry


def body(**params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "x", "params": params}).encode()


def test_the_handshake_is_kept_with_its_result() -> None:
    assert journal_entries("initialize", b"asked", b"answered") == [
        JournalEntry("initialize", "", b"asked"),
        JournalEntry("result", "", b"answered"),
    ]
    assert journal_entries("initialize", b"asked", None) == []


@pytest.mark.parametrize(
    ("method", "kind"), [("notifications/initialized", "initialized"), ("logging/setLevel", "level")]
)
def test_the_last_one_is_kept(method: str, kind: str) -> None:
    assert journal_entries(method, b"{}", None) == [JournalEntry(kind, "", b"{}")]


def test_a_subscription_is_kept_until_it_is_taken_back() -> None:
    (kept,) = journal_entries("resources/subscribe", body(uri="file:///a"), None)
    (gone,) = journal_entries("resources/unsubscribe", body(uri="file:///a"), None)
    assert (kept.kind, kept.detail) == (gone.kind, gone.detail)
    assert (kept.body, gone.body) == (body(uri="file:///a"), None)
    (other,) = journal_entries("resources/subscribe", body(uri="file:///b"), None)
    assert other.detail != kept.detail


@pytest.mark.parametrize("method", ["tools/call", "ping", "notifications/progress", "notifications/cancelled"])
def test_what_establishes_nothing_is_not_kept(method: str) -> None:
    assert journal_entries(method, body(), b"{}") == []


@settings(deadline=None)  # a machine that others use is slow at times
@given(uri=st.one_of(st.text(st.characters(exclude_categories=[])), st.none(), st.integers(), st.lists(st.text())))
def test_every_uri_makes_a_detail_that_postgres_takes(uri: Any) -> None:
    (entry,) = journal_entries("resources/subscribe", body(uri=uri), None)
    assert "\0" not in entry.detail
    entry.detail.encode("utf-8")


def test_what_the_handshake_settled() -> None:
    asked = body(clientInfo={"name": "probe", "version": "1"}, capabilities={"roots": {}})
    settled = handshake(asked, json.dumps({"result": {"protocolVersion": "2025-11-25"}}).encode())
    assert (settled.protocol_version, settled.client_name, settled.client_version) == ("2025-11-25", "probe", "1")
    assert json.loads(settled.capabilities) == {"roots": {}}


@settings(deadline=None)  # a machine that others use is slow at times
@given(name=st.one_of(st.text(st.characters(exclude_categories=[]), max_size=400), st.none(), st.integers()))
def test_every_client_name_makes_a_label_that_postgres_takes(name: Any) -> None:
    settled = handshake(body(clientInfo={"name": name}), b'{"result": {"protocolVersion": "2025-06-18"}}')
    assert "\0" not in settled.client_name
    assert len(settled.client_name) <= 200
    settled.client_name.encode("utf-8")
