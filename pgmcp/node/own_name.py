"""What a node is called that was given no name: as its host, and with the process id where several are there."""

from __future__ import annotations

import os
import re
import socket
import weakref
from collections.abc import Callable

from pgmcp.settings import Settings

LONGEST = 63


def host_name() -> str:
    """The host's name, as a node may have it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:LONGEST] or "node"


def named(settings: Settings, holder: object) -> tuple[Settings, Callable[[], object]]:
    """The settings of a node that has a name, and what gives that name up.

    The host's own name goes to the first node there of its schema, until that node ends. Names need not be unique:
    they are for people, and for balancers.

    Args:
        holder: the node.
    """
    if settings.node_name:
        return settings, _nothing
    name = host_name()
    give_up = _hold(f"{name}/{settings.schema_name}", holder)
    if give_up is None:
        process = f"-{os.getpid()}"
        name = name[: LONGEST - len(process)] + process
    return settings.model_copy(update={"node_name": name}), give_up or _nothing


def _hold(name: str, holder: object) -> Callable[[], object] | None:
    """Take a name for the holder; None where somebody else has it, or names cannot be held.

    It is given up with the holder, or the process.
    """
    try:
        taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError:  # a sandbox may have none (RestrictAddressFamilies)
        return None
    try:
        taken.bind(f"\0pgmcp/{name}")  # in no file system: there is nothing to clean up
    except OSError:
        taken.close()
        return None
    return weakref.finalize(holder, taken.close)


def _nothing() -> None:
    return None


def served_at(settings: Settings, port: int) -> str:
    """The address of a node that listens itself: that of its host where it listens on every address.

    Args:
        port: the one that it got.
    """
    if settings.address:
        return settings.address
    host = host_name() if settings.host in {"", "0.0.0.0", "::"} else settings.host  # noqa: S104 - compared
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
