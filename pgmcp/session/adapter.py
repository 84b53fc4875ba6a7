"""What an adapter to an MCP server does; ``adapters/`` holds the implementations.

An adapter turns a served target into conversations: one per live session, fed with client messages as JSON text and
giving back whatever the server writes. It knows the server's SDK; the actor knows the cluster; neither knows both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from pgmcp.secret_box import StateBox
from pgmcp.session.state import Hooks, SessionState
from pgmcp.types import Publication

RESTORED_HEADER = "pgmcp-restored"
"""By this header server code can tell a message that the node itself replays: it has no caller."""


class Kind(StrEnum):
    """What a server wrote."""

    RESULT = "result"
    ERROR = "error"
    REQUEST = "request"
    NOTIFICATION = "notification"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message that the server wrote.

    ``rpc_id`` is the JSON text of its id; ``related`` that of the client's request it belongs to, if any.
    """

    kind: Kind
    message: bytes
    rpc_id: str | None = None
    method: str | None = None
    related: str | None = None


async def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Incoming:
    """One client message for the server.

    ``context`` is what ``Adapter.describe`` made of the HTTP exchange that brought it, on whichever node that was; None
    for a message of the node's own, by which a session is restored.
    ``unanswered`` is awaited when the request settles without an answer; ``can_ask`` says whether the server may send
    requests on this request's stream.
    """

    body: bytes
    context: Mapping[str, Any] | None = None
    can_ask: bool = True
    unanswered: Callable[[], Awaitable[None]] = _nothing
    close_stream: Callable[[], Awaitable[None]] | None = None
    close_standalone: Callable[[], Awaitable[None]] | None = None


class Conversation(Protocol):
    """The two ends that an actor offers to an adapter."""

    state: SessionState

    async def receive(self) -> Incoming | None:
        """The next client message; None at the end of the session."""
        ...

    async def emit(self, outgoing: Outgoing) -> None:
        """Take what the server wrote; returns when it is stored.

        Raises:
            MessageTooLarge: it is no answer, and too large; nothing of it is sent.
        """
        ...


@dataclass(frozen=True, slots=True)
class Shared:
    """What a server is given for requests without a session (2026-07-28), which any node may get.

    ``states`` seals ``requestState``, and ``states_once`` says whether each may be used once only; ``json_only`` says
    whether answers must be plain JSON.
    """

    states: StateBox
    states_once: bool = False
    json_only: bool = False


class Adapter(Protocol):
    """A served target, and what its server does with its own memory when a session moves."""

    hooks: Hooks

    def lifespan(self, shared: Shared) -> AbstractAsyncContextManager[None]:
        """The server's own start and stop, once per process and for both eras."""
        ...

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an HTTP exchange that has no session, within the lifespan; cancelled when its client has gone.

        Raises:
            NodeNotReady: outside of the lifespan.
        """
        ...

    def end_streams(self) -> None:
        """End the streams that do not end by themselves (``subscriptions/listen``), each with its result."""
        ...

    async def converse(self, session_id: str, conversation: Conversation) -> None:
        """Run one live session until ``receive`` returns None."""
        ...

    def describe(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        """What of an HTTP exchange has to reach the server, as JSON values: request line, headers, identity."""
        ...


class Bus(Protocol):
    """Where a server says that something has changed, and where those listen that are told of it."""

    def attach(self, spread: Callable[[Publication], Awaitable[None]]) -> Callable[[], None]:
        """Publish through a node from now on; returns what ends that."""
        ...

    async def tell(self, publications: Iterable[Publication]) -> None:
        """Tell the listeners of this process."""
        ...

    async def missed(self) -> None:
        """Tell each listener once of everything that it may want to hear of."""
        ...


@dataclass(frozen=True, slots=True)
class Adapted:
    """A served target, as its adapter's module gives it.

    ``name`` is the same in all processes that serve it. ``bus`` is where it publishes and listens, unless it has a bus
    of its own. ``whole`` is the application that its own package would serve.
    """

    name: str
    adapter: Adapter
    bus: Bus
    whole: Starlette
