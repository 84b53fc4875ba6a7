"""How a node starts, and how it says why it cannot."""

from __future__ import annotations

import asyncio
import signal
import socket
import traceback
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette

from pgmcp import Cluster
from pgmcp.cli.workers import supervise
from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, LoginRefused, PgmcpError, PortTaken, SettingsError
from pgmcp.node import Node
from pgmcp.node.first_connection import connect
from pgmcp.node.server import own_sockets, shared_socket
from pgmcp.settings import Settings
from pgmcp.store.database import Database
from tests.harness.cluster import everything
from tests.harness.proxy import proxied
from tests.harness.waiting import eventually


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def node(database: str, **settings: Any) -> Node:
    return Node(Settings(database_url=database, port=0, **settings), everything())


async def test_a_database_that_is_away_is_waited_for(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with proxied(database) as (proxy, address):
        proxy.refusing = True

        async def start() -> None:
            async with node(address).running():
                pass

        starting = asyncio.create_task(start())
        await eventually(lambda: proxy.connected >= 3 or starting.done(), "it tries again")
        assert not starting.done()
        [line] = warnings(caplog)
        assert "does not answer" in line
        assert line.endswith("This node waits for it, 60 s at most (--wait).")
        proxy.refusing = False
        await starting
        _, over = warnings(caplog)
        assert over.startswith("the database answers after")


async def test_it_waits_no_longer_than_it_was_told(database: str, caplog: pytest.LogCaptureFixture) -> None:
    async with proxied(database) as (proxy, address):
        proxy.refusing = True
        with pytest.raises(DatabaseUnavailable, match=r"This node has waited 0\.6 s for it"):
            async with node(address, wait="600ms").running():
                pytest.fail("it started")
        assert len(warnings(caplog)) == 1
        caplog.clear()
        with pytest.raises(DatabaseUnavailable, match="does not answer"):
            async with node(address, wait=0).running():
                pytest.fail("it started")
        assert warnings(caplog) == []


async def test_who_was_told_to_stop_while_it_connected_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))  # the HTTP server's
    database = Database(Settings(database_url="postgresql://h/db"), Clock())

    async def open_slowly() -> None:
        signal.raise_signal(signal.SIGTERM)
        await eventually(lambda: heard, "it is handed to the server")

    async def revision() -> str:
        return "1"

    monkeypatch.setattr(database, "open", open_slowly)
    monkeypatch.setattr(database, "revision", revision)
    try:
        with pytest.raises(DatabaseUnavailable, match="told to stop"):
            await connect(database, Clock(), 60)
    finally:
        signal.signal(signal.SIGTERM, before)


async def started(app: Any) -> list[dict[str, Any]]:
    """What an application says to its HTTP server when that starts it."""
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "lifespan.startup"}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return said


async def test_a_wrong_password_is_one_line_in_other_peoples_servers(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    at = urlsplit(database)
    wrong = at._replace(netloc=f"{at.username}:wrong@{at.hostname}:{at.port}").geturl()
    [message] = await started(Cluster(wrong).app(everything()))
    assert message["type"] == "lifespan.startup.failed"
    assert "refuses the login (InvalidPasswordError: password authentication failed" in message["message"]
    assert "\n" not in message["message"]
    assert "wrong" not in message["message"]
    assert warnings(caplog) == [], "waiting does not help"

    outer = Starlette(lifespan=lambda _: Cluster(wrong).app(everything()).lifespan())
    with pytest.raises(LoginRefused) as found:
        await started(outer)
    shown = traceback.format_exception(found.value)
    assert "asyncpg" not in "".join(shown)
    assert len("".join(shown).splitlines()) < 40


async def test_what_waiting_does_not_mend_is_not_waited_for(database: str, caplog: pytest.LogCaptureFixture) -> None:
    for urls in (
        {"database_url": "mysql://user@host/app"},
        {"database_url_file": "/nowhere"},
        {"database_url": database, "listen_url": "mysql://user@host/app"},
        {"database_url": database, "listen_url_file": "/nowhere"},
    ):
        with pytest.raises(SettingsError, match=r"malformed|/nowhere"):
            async with Node(Settings(**urls), everything()).running():
                pytest.fail("it started")
    absent = urlsplit(database)._replace(path="/no_such_database").geturl()
    with pytest.raises(LoginRefused, match="no_such_database"):
        async with node(absent).running():
            pytest.fail("it started")
    assert warnings(caplog) == []


async def test_variables_that_pgmcp_does_not_know_are_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGMCP_DATABASE_URL", raising=False)
    monkeypatch.setenv("PGMCP_DATABSE_URL", "postgresql://elsewhere/app")
    with pytest.raises(SettingsError, match="No database"):
        Cluster().app(everything())
    text = "PGMCP_DATABSE_URL is no variable of pgmcp and has no effect: is PGMCP_DATABASE_URL meant?"
    assert warnings(caplog) == [f"a variable that nobody reads: {text}"]


def refusal(**where: Any) -> PgmcpError:
    with pytest.raises(PgmcpError) as found:
        own_sockets(Settings(**where))
    return found.value


def test_the_port_is_taken_or_the_reason_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            error = refusal(host=host, port=port)
            assert isinstance(error, PortTaken)
            assert f"Port {port} of {host} is in use" in str(error)
    for host in ("192.0.2.1", "no-such-host.invalid", "a..b"):
        assert isinstance(refusal(host=host, port=port), SettingsError)
    with shared_socket(Settings(port=0)) as others:
        others.listen()
        port = others.getsockname()[1]
        with pytest.raises(PortTaken, match=f"Port {port} .* is in use"):
            supervise(Settings(port=port), [], {}, 2)
    taken = own_sockets(Settings(host="localhost", port=0))
    try:
        assert len({each.getsockname()[1] for each in taken}) == 1, "one port for all addresses of a host"
        for each in taken:
            each.listen()
    finally:
        for each in taken:
            each.close()
