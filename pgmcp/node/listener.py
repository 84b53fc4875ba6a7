"""Closing a port so that nobody who came in is turned out.

When a listener closes, the kernel resets every connection that it has accepted and nobody has read, and a balancer
does not repeat the POST that was in it. So the port first turns deaf: the kernel drops requests for new connections
(they are tried again a second later, and refused then, so that balancers go on to the next node), while what is in is
read. Then it closes.

Failure handling: where the kernel knows no such filter (it is Linux's) the port closes after the same while without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Sequence

SO_ATTACH_FILTER = 26
DEAF_SECONDS = 0.2
"""Seconds from deaf to closed: for handshakes under way, and for what was accepted to be read."""

_SYN, _ACK, _FLAGS = 0x02, 0x10, 13
_DROP_OPENINGS = (
    (0x30, 0, 0, _FLAGS),  # load the flags of the TCP header
    (0x54, 0, 0, _SYN | _ACK),
    (0x15, 0, 1, _SYN),  # a SYN without ACK opens a connection:
    (0x06, 0, 0, 0),  # keep nothing of it;
    (0x06, 0, 0, 0xFFFFFFFF),  # keep all of anything else
)


def deafen(listener: socket.socket) -> None:
    """Have the kernel drop every request for a new connection to a listening TCP socket.

    Raises:
        OSError: this kernel cannot.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _DROP_OPENINGS))
    program = struct.pack("HP", len(_DROP_OPENINGS), ctypes.addressof(code))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


async def close(servers: Sequence[asyncio.Server]) -> None:
    """Close the ports of HTTP servers; the connections that they have go on."""
    for server in servers:
        for listener in server.sockets:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(listener.fileno())) as own:
                deafen(own)
    await asyncio.sleep(DEAF_SECONDS)
    for server in servers:
        server.close()
