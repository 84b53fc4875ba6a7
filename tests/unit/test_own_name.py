"""What a node is called, and where it says that it is."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import pytest

from pgmcp.node.own_name import host_name, named, served_at
from pgmcp.settings import Settings


class Holder:
    """A node, as far as names go."""


def test_the_first_on_a_host_has_its_name_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: f"web é.{'x' * 80}")
    assert host_name() == f"web--.{'x' * 57}"
    first, second = Holder(), Holder()
    settings = Settings(schema_name="only_here")
    assert named(Settings(schema_name="only_here", node_name="given"), first)[0].node_name == "given"
    own, give_up = named(settings, first)
    assert own.node_name == host_name()
    other = named(settings, second)[0].node_name
    assert other == host_name()[: 63 - len(f"-{os.getpid()}")] + f"-{os.getpid()}"
    assert Settings(node_name=other).node_name == other
    assert named(Settings(schema_name="elsewhere"), second)[0].node_name == host_name()
    give_up()
    assert named(settings, second)[0].node_name == host_name()
    del second
    assert named(settings, first)[0].node_name == host_name()


def test_where_no_name_can_be_held_a_node_has_its_process_in_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refused)
    assert named(Settings(), Holder())[0].node_name.endswith(f"-{os.getpid()}")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "127.0.0.1:8123"),
        ({"host": "0.0.0.0"}, "{host}:8123"),
        ({"host": "::"}, "{host}:8123"),
        ({"host": "::1"}, "[::1]:8123"),
        ({"host": "10.0.0.7", "address": "mcp-1.internal:80"}, "mcp-1.internal:80"),
    ],
)
def test_an_address_is_where_others_find_it(settings: dict[str, Any], said: str) -> None:
    assert served_at(Settings(**settings), 8123) == said.format(host=host_name())
