"""What pgmcp knows of MCP is what the SDK knows, and what the statements say again is the same."""

from __future__ import annotations

import re

import mcp_types
import pytest
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from mcp.shared import inbound
from mcp_types import methods
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, KNOWN_PROTOCOL_VERSIONS, is_version_at_least

from pgmcp import protocol
from pgmcp.protocol import METHODS, REVISIONS, Coalescing, Revision, method_of, revision_of
from pgmcp.store.statements import names, statement


def test_the_revisions_are_those_of_the_sdk() -> None:
    assert tuple(REVISIONS) == KNOWN_PROTOCOL_VERSIONS
    assert {name for name, revision in REVISIONS.items() if revision.handshake} == set(HANDSHAKE_PROTOCOL_VERSIONS)


@pytest.mark.parametrize("version", [*KNOWN_PROTOCOL_VERSIONS, "2099-01-01", ""])
def test_priming_events_came_with_2025_11_25(version: str) -> None:
    assert revision_of(version).resumes == is_version_at_least(version, "2025-11-25")


@pytest.mark.parametrize("version", ["2099-01-01", "", None])
def test_of_an_unknown_revision_nothing_is_taken_for_granted(version: str | None) -> None:
    assert revision_of(version) == Revision()


def test_batches_are_of_one_revision() -> None:
    assert [name for name, revision in REVISIONS.items() if revision.batches] == ["2025-03-26"]
    assert protocol.BATCHING == "2025-03-26"


def test_the_methods_of_clients_are_the_sdks() -> None:
    known = methods.SPEC_CLIENT_METHODS | methods.SPEC_CLIENT_NOTIFICATION_METHODS
    assert {name for name, method in METHODS.items() if method.harmless or method.journal} <= known


def test_named_methods_are_those_of_the_sdk() -> None:
    assert {name: method.name for name, method in METHODS.items() if method.name} == dict(inbound.NAME_BEARING_METHODS)


def test_a_tool_is_harmless_only_if_it_says_so() -> None:
    assert not method_of("tools/call").harmless
    assert not method_of("made/up").harmless


@pytest.mark.parametrize(
    ("method", "gives_way"),
    [
        ("notifications/resources/updated", Coalescing.URI),
        ("notifications/tools/list_changed", Coalescing.METHOD),
        ("notifications/made-up/list_changed", Coalescing.METHOD),
        ("notifications/message", Coalescing.ROOM),
        ("notifications/cancelled", Coalescing.NOTHING),
    ],
)
def test_what_waits_gives_way_to(method: str, gives_way: Coalescing) -> None:
    assert method_of(method).gives_way == gives_way


def test_codes_and_headers_are_the_sdks() -> None:
    for name in ("PARSE_ERROR", "INVALID_REQUEST", "INVALID_PARAMS", "INTERNAL_ERROR"):
        assert getattr(protocol, name) == getattr(mcp_types, name)
    assert MCP_SESSION_ID_HEADER.lower() == protocol.SESSION_ID_HEADER
    assert protocol.VERSION_HEADER == inbound.MCP_PROTOCOL_VERSION_HEADER
    assert protocol.METHOD_HEADER == inbound.MCP_METHOD_HEADER


def test_the_statements_say_methods_that_are_known() -> None:
    said = {method for name in names() for method in re.findall(r"notifications/\w+", statement(name, "pgmcp"))}
    assert said == {protocol.CANCELLED, protocol.INITIALIZED, protocol.PROGRESS}
