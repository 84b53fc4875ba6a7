"""A node in a process of its own: uvicorn, its socket, its signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket

import uvicorn
import uvloop

from pgmcp.errors import SettingsError
from pgmcp.node import listener
from pgmcp.node.http_protocol import limited, raise_file_limit
from pgmcp.node.node import Node
from pgmcp.node.own_name import served_at
from pgmcp.ops.logs import configure
from pgmcp.session.target import created, load
from pgmcp.settings import Settings

KEEP_ALIVE_SECONDS = 75
"""Seconds for which an idle HTTP connection stays: longer than in balancers, or they POST into one that just closes."""


def shared_socket(settings: Settings) -> socket.socket:
    """A socket on the node's port that other processes may share (SO_REUSEPORT).

    Raises:
        SettingsError: somebody else has the port for himself.
    """
    shared = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        shared.bind((settings.host, settings.port))
    except OSError as error:
        shared.close()
        message = f"Port {settings.port} of {settings.host} cannot be used ({error.strerror}); choose another --port."
        raise SettingsError(message) from error
    return shared


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
    configure(settings.log_format)
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    served = created(target, runner.run) if factory else load(target)
    configure(settings.log_format)  # anew: the target may have had ideas of its own
    sockets = [shared_socket(settings)] if shared_port or not settings.port else None  # a free port is known only so
    port = sockets[0].getsockname()[1] if sockets else settings.port
    node = Node(settings.model_copy(update={"address": served_at(settings, port)}), served)
    config = uvicorn.Config(
        node.application(),
        host=settings.host,
        port=settings.port,
        http=limited(settings),
        access_log=False,
        log_config=None,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    node.shut = lambda: listener.close(server.servers)
    logging.getLogger("uvicorn.error").addFilter(lambda _: node.failure is None)  # it is said below, in one line
    gc.collect()
    gc.freeze()  # what was imported stays: a full collection that walks through it stops the node for 0.1 s
    with contextlib.suppress(KeyboardInterrupt, SystemExit), runner:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it once more when it has stopped
        runner.run(server.serve(sockets=sockets))
    if node.failure is not None:
        raise node.failure
    return 0 if server.started else 1
