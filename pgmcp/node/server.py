"""A node in a process of its own: uvicorn, its socket, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket

import uvicorn
import uvloop

from pgmcp.errors import PgmcpError, PortTaken, SettingsError
from pgmcp.node import listener
from pgmcp.node.http_protocol import limited, raise_file_limit
from pgmcp.node.node import Node
from pgmcp.node.own_name import named, served_at
from pgmcp.ops.logs import configure
from pgmcp.session.target import created, load
from pgmcp.settings import Settings

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
"""Seconds for which an idle HTTP connection stays: longer than in balancers, or they POST into one that just closes."""


class _Server(uvicorn.Server):
    """uvicorn, which leaves its application running when it cannot listen, and does not say where it serves."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen, and say so."""
        try:
            await super().startup(sockets)
        except OSError:
            await self.lifespan.shutdown()
            raise
        if self.started:
            settings, port = self._settings, self.servers[0].sockets[0].getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            at = f"http://{host}:{port}"
            logger.info("node %s serves %s%s", settings.node_name, at, settings.mcp_path)


def shared_socket(settings: Settings) -> socket.socket:
    """A socket on the node's port that other processes may share (SO_REUSEPORT).

    Raises:
        PortTaken: somebody else has the port for himself.
        SettingsError: there is no such address here.
    """
    shared = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        shared.bind((settings.host, settings.port))
    except (OSError, UnicodeError) as error:
        shared.close()
        raise _refused(settings, error) from error
    return shared


def own_sockets(settings: Settings) -> list[socket.socket]:
    """Sockets on the node's port, one for each address of its host, that nobody listens on yet.

    Raises:
        PortTaken: somebody else listens there.
        SettingsError: there is no such address here.
    """
    taken: list[socket.socket] = []
    port, absent = settings.port, None
    try:
        found = socket.getaddrinfo(settings.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            own = socket.socket(family, kind, protocol)
            try:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                own.bind((address[0], port, *address[2:]))
            except OSError as error:
                own.close()
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                absent = error  # localhost may have an IPv6 address that this machine does not
            else:
                taken.append(own)
                port = own.getsockname()[1]
        if absent is not None and not taken:
            raise absent
    except (OSError, UnicodeError) as error:
        for own in taken:
            own.close()
        raise _refused(settings, error) from error
    return taken


def _refused(settings: Settings, error: OSError | UnicodeError) -> PgmcpError:
    if isinstance(error, UnicodeError):  # of the host's name
        return SettingsError(f"{settings.host!r} is no name of a host: choose another --host.")
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"Port {settings.port} of {settings.host} is in use: another process listens there. Stop that, or choose "
            f"another --port."
        )
    return SettingsError(
        f"Cannot listen on port {settings.port} of {settings.host} ({error.strerror or error}): choose another --host "
        f"or --port."
    )


def serve(settings: Settings, target: str, *, factory: bool = False, shared_port: bool = False) -> int:
    """Run one node in this process until SIGTERM or SIGINT.

    Args:
        settings: the node's settings.
        target: ``module:attribute`` or ``path/to/file.py:attribute``.
        factory: the target makes the server.
        shared_port: listen beside other processes on the port (SO_REUSEPORT).

    Returns:
        The process's exit code: 0 after an orderly stop.

    Raises:
        PgmcpError: the node cannot start; the message says why and what to do.
    """
    raise_file_limit()
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    settings, _ = named(settings, runner)
    configure(settings.log_format, level=settings.log_level, node=settings.node_name)
    sockets = [shared_socket(settings)] if shared_port else own_sockets(settings)
    served = created(target, runner.run) if factory else load(target)
    # Anew: the target may have had ideas of its own.
    configure(settings.log_format, level=settings.log_level, node=settings.node_name)
    port = sockets[0].getsockname()[1]
    node = Node(settings.model_copy(update={"address": served_at(settings, port)}), served)
    config = uvicorn.Config(
        node.application(),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=limited(settings),
        access_log=False,
        log_config=None,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, settings)
    node.shut = lambda: listener.close(server.servers)
    logging.getLogger("uvicorn.error").addFilter(lambda _: node.failure is None)  # it is said below, in one line
    gc.collect()
    gc.freeze()  # what was imported stays: a full collection that walks through it stops the node for 0.1 s
    try:
        with contextlib.suppress(KeyboardInterrupt, SystemExit), runner:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it once more when it has stopped
            runner.run(server.serve(sockets=sockets))
    except OSError as error:  # two that start at once both get the port; then one of them listens
        raise _refused(settings, error) from error
    if node.failure is not None and not server.should_exit:
        raise node.failure
    return 0 if server.started or node.failure is not None else 1
