"""What server code can know and keep of its session across a change of owner (G13).

A server's memory dies with its node. What it puts here is stored under the owner's fence before ``set`` returns, and is
there on the next owner. What lies in memory only can be exported when a node leaves in an orderly way, and is handed to
the server again on the next one.

Invariant: reads are answered from the owner's memory, which holds what was stored; there is one owner.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from pgmcp.errors import Fenced, NoSession, StateRefused
from pgmcp.types import JournalEntry, session_alias

logger = logging.getLogger(__name__)

KIND, EXPORT = "state", "export"
KEYS, KEY_LENGTH, VALUE_BYTES = 64, 200, 64 * 1024

EXPORT_SECONDS = 2.0
"""Seconds that a server may take to export its memory of a session."""

Write = Callable[[JournalEntry], Awaitable[None]]


class SessionState:
    """One session's facts and kept values.

    Args:
        session_id: the session's public id.
        restored: whether this process got the session from another node.
        kept: values by key, as JSON.
        write: stores an entry under the owner's fence.
    """

    def __init__(
        self, session_id: str, write: Write, *, restored: bool, kept: Mapping[str, bytes] | None = None
    ) -> None:
        self.session_id, self.restored = session_id, restored
        self._write, self._kept = write, dict(kept or {})

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        return json.loads(self._kept[key]) if key in self._kept else default

    async def set(self, key: str, value: Any) -> None:
        """Keep a JSON value; it is stored when this returns.

        Raises:
            StateRefused: it is no JSON, larger than 64 KiB, or there are 64 keys already.
            Fenced: this node does not own the session any more; nothing was stored.
        """
        body = _encoded(value)
        if key not in self._kept and len(self._kept) >= KEYS:
            message = f"This session keeps {KEYS} values already; delete one before you set another."
            raise StateRefused(message)
        if not key or len(key) > KEY_LENGTH or "\0" in key or not key.isprintable():
            message = f"A key has 1 to {KEY_LENGTH} printable characters."
            raise StateRefused(message)
        await self._write(JournalEntry(KIND, key, body))
        self._kept[key] = body

    async def delete(self, key: str) -> None:
        """Forget a key.

        Raises:
            Fenced: this node does not own the session any more; nothing was stored.
        """
        if key in self._kept:
            await self._write(JournalEntry(KIND, key))
            del self._kept[key]

    async def export(self, hooks: Hooks) -> None:
        """Store what a server remembers of the session, for the next owner; what fails costs only that."""
        if hooks.export is None:
            return
        try:
            async with asyncio.timeout(EXPORT_SECONDS):
                await self._write(JournalEntry(EXPORT, "", _encoded(await hooks.export(self))))
        except Fenced:
            return  # it has ended, or has another owner
        except Exception:
            logger.exception("session %s leaves its server's memory behind", session_alias(self.session_id))


current: ContextVar[SessionState] = ContextVar("pgmcp_session_state")


def session_state(ctx: object = None) -> SessionState:
    """The session whose message is being handled.

    Args:
        ctx: the handler's context, in whichever style the server is written; the session is found without it, too.

    Raises:
        NoSession: this is no handler of a session that pgmcp serves, but maybe one of a request without (2026-07-28).
    """
    try:
        return current.get()
    except LookupError:
        message = (
            "There is no session here. session_state() is for handlers of a server that pgmcp serves, and a request of "
            "2026-07-28 has no session: its client may ask for an older revision."
        )
        raise NoSession(message) from None


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a server does with its memory of a session when the session moves."""

    export: Callable[[SessionState], Awaitable[Any]] | None = None
    restore: Callable[[SessionState, Any], Awaitable[None]] | None = None


_hooks: WeakKeyDictionary[Any, Hooks] = WeakKeyDictionary()


def keep_memory(
    server: object,
    *,
    export: Callable[[SessionState], Awaitable[Any]] | None = None,
    restore: Callable[[SessionState, Any], Awaitable[None]] | None = None,
) -> None:
    """Say how a server's memory of a session moves with it.

    Args:
        server: the served ``MCPServer`` or ``Server``.
        export: called on a node that leaves in an orderly way; gives a JSON value of at most 64 KiB.
        restore: called on a new owner before the session goes on, with what was exported, or None after a death.
    """
    _hooks[server] = Hooks(export, restore)


def hooks_of(server: object) -> Hooks:
    """The hooks of a server."""
    return _hooks.get(server, Hooks())


def _encoded(value: Any) -> bytes:
    try:
        body = json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        message = f"Session state is JSON: {error}."
        raise StateRefused(message) from error
    if len(body) > VALUE_BYTES:
        message = f"A value of session state has at most {VALUE_BYTES} bytes, this one {len(body)}."
        raise StateRefused(message)
    return body
