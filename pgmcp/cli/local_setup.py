"""What a cluster on this machine stands on: its ports, its database, a bundled example to serve.

Invariants:
    * PostgreSQL does not outlive this process.
    * The database's address, which holds a password, reaches the nodes by environment, never by argument.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pgmcp
from pgmcp.cli.local import LocalCluster
from pgmcp.cli.options import arguments, environment, load
from pgmcp.cli.signals import ended_by
from pgmcp.embedded import EmbeddedPostgres, free_port
from pgmcp.errors import PortTaken, SchemaInUse, SettingsError, TargetError
from pgmcp.settings import Settings, variable
from pgmcp.store.commands import identity
from pgmcp.store.schema import migrations

MAKER = "up"
"""Who has made a schema in which ``up`` starts nodes."""


def example(name: str) -> str:
    """The target of a bundled example: inside the package in a wheel, beside it in a checkout.

    Raises:
        TargetError: it is in neither place.
    """
    package = Path(pgmcp.__file__).parent
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / f"{name}.py").is_file():
            return f"{folder / name}.py:mcp"
    message = "This installation has no bundled example. Name a TARGET: module:attribute or path/to/file.py:attribute."
    raise TargetError(message)


def of_its_own(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a cluster of its own, whatever the environment says: in a given database it has a new schema."""
    schema = f"pgmcp_demo_{secrets.token_hex(4)}" if given.get("database_url") else "pgmcp"
    addresses = dict.fromkeys(("database_url", "database_url_file", "listen_url", "listen_url_file"), "")
    return {**addresses, "schema_name": schema, "cluster": ""} | given


@contextmanager
def local_cluster(
    given: dict[str, Any],
    target: str,
    count: int,
    report: Callable[[str], None],
    data_dir: Path | None = None,
    *,
    passing: bool = False,
) -> Iterator[tuple[LocalCluster, str]]:
    """A cluster that is ready to run, and its database's address, migrated. It lives in no schema that others made.

    Args:
        given: options, over the environment.
        target: the MCP server.
        count: how many nodes.
        report: is told in one line what becomes of the nodes.
        data_dir: keeps the embedded PostgreSQL's data; without it they go at the end.
        passing: in a given database its schema is a new one, too, and goes at the end.

    Raises:
        SettingsError: a value or a port cannot work, or somebody else has made the schema.
        DatabaseUnavailable, SchemaError: of the migration.
    """
    settings = load(given)
    _look_for(target)
    # Until the event loop handles signals, the others unwind as Ctrl-C does, so that what was started is stopped.
    for signum in ended_by():
        signal.signal(signum, signal.default_int_handler)
    entry_socket, ports = _ports(settings, count, report)
    with entry_socket, _database(settings, data_dir, count) as url:
        passed = {name: value for name, value in given.items() if name not in ("host", "port")}
        env, options = _node_environment(settings, passed, url), arguments(passed)
        given_database = bool(settings.database_url)
        with _schema(url, settings.schema_name, given=given_database, passing=passing and given_database):
            yield LocalCluster(settings, target, ports, entry_socket, env, options, report), url


@contextmanager
def _schema(url: str, name: str, *, given: bool, passing: bool) -> Iterator[None]:
    """The tables, in a schema that is ours; in an embedded database all are, also those that older builds made."""
    if passing and identity.exists(url, name):
        message = (
            f"There is a schema {name} in that database, and this one would go at the end: choose another --schema."
        )
        raise SettingsError(message)
    new = migrations.current(url, name) is None
    if given and not new:
        identity.refuse_foreign(url, name, MAKER)
    try:
        with suppress(SchemaInUse):  # others live there: what this build needs of it was done
            migrations.upgrade(url, name)
        if new:
            identity.note_maker(url, name, MAKER)
        yield
    finally:
        if passing:
            identity.remove(url, name)


def _look_for(target: str) -> None:
    """See to it that there is something to serve, before anything is started for it.

    Raises:
        TargetError: there is not.
    """
    name, colon, attribute = target.rpartition(":")
    if not (name and colon and attribute):
        message = (
            f"The target {target!r} is not of the form module:attribute or path/to/file.py:attribute (server.py:mcp)."
        )
        raise TargetError(message)
    if name.endswith(".py"):
        found, kind = Path(name).is_file(), "file"
    else:
        top = name.partition(".")[0]
        found = bool(top) and (find_spec(top) or PathFinder.find_spec(top, [str(Path.cwd())])) is not None
        kind = "module"
    if not found:
        message = f"The target {target!r} cannot be loaded: there is no {kind} {name} (looked for in {Path.cwd()})."
        raise TargetError(message)


def _ports(settings: Settings, count: int, report: Callable[[str], None]) -> tuple[socket.socket, list[int]]:
    """The entry port, taken, and a port for each node; others than the usual ones where those are in use.

    Raises:
        PortTaken: the ports that were asked for are in use.
    """
    usual = settings.port
    if "port" in settings.model_fields_set:
        return _taken(settings.host, usual, count)
    step = 10 * (1 + count // 10)
    for port in (*range(usual, usual + 10 * step, step), 0):
        try:
            taken, ports = _taken(settings.host, port, count)
        except PortTaken:
            continue
        if port != usual:
            report(
                f"ports {usual} to {usual + count} are not all free: this cluster takes {taken.getsockname()[1]} for "
                f"clients and {', '.join(map(str, ports))} for its nodes"
            )
        break
    return taken, ports


def _taken(host: str, port: int, count: int) -> tuple[socket.socket, list[int]]:
    """Take the entry port at once, but do not listen yet: clients are refused until the cluster is ready."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, since asyncio turns Nagle's delay off only where it sees that this is TCP.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        _bind(taken, host, port)
        return taken, _node_ports(port, count)
    except BaseException:
        taken.close()
        raise


def _node_ports(port: int, count: int) -> list[int]:
    if not port:
        return [free_port() for _ in range(count)]
    ports = list(range(port + 1, port + 1 + count))
    for number in ports:
        with socket.socket() as probe:
            _bind(probe, "127.0.0.1", number)
    return ports


def _bind(taken: socket.socket, host: str, port: int) -> None:
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"Cannot listen on {host}:{port}: {reason}. Choose another --port; the nodes take the ones after it."
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE
        raise (PortTaken if in_use else SettingsError)(message) from error


@contextmanager
def _database(settings: Settings, data_dir: Path | None, count: int) -> Iterator[str]:
    """The given database, or an embedded one for as long as the cluster runs."""
    if settings.database_url:
        yield settings.database_url
        return
    data = data_dir or Path(tempfile.gettempdir()) / f"pgmcp-up-{secrets.token_hex(8)}"
    connections = max(100, count * (settings.pool_size + 4) + 20)
    # Commits take as long as they do in earnest, even where nobody will miss the data; only the set-up is hasty.
    earnest = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
    durable = data_dir is not None
    server = EmbeddedPostgres(data, settings={**earnest, "max_connections": str(connections)}, durable=durable)
    try:
        with server:
            yield server.url
    finally:
        if data_dir is None:
            shutil.rmtree(server.home, ignore_errors=True)


def _node_environment(settings: Settings, given: dict[str, Any], url: str) -> dict[str, str]:
    env = {**os.environ, **environment(given), **environment({"database_url": url})}
    if "drain_notice" not in settings.model_fields_set:
        env[variable("drain_notice")] = "0"  # nobody but the entry port could notice, and that closes first
    if not settings.database_url:
        for name in ("PGMCP_LISTEN_URL", "PGMCP_LISTEN_URL_FILE"):
            env.pop(name, None)  # it would be another database's
    return env
