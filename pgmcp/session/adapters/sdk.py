"""The adapter for the official SDK's ``Server`` and ``MCPServer`` (mcp 2.x).

It drives ``mcp.server.runner.serve_loop`` over a pair of own streams: the seam that the SDK documents for custom
transports. Nothing in it knows the cluster.
"""

from __future__ import annotations

import contextvars
import importlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pydantic_core
from mcp.server import Server
from mcp.server.auth.middleware.auth_context import auth_context_var
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.mcpserver import MCPServer
from mcp.server.runner import serve_loop
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, jsonrpc_message_adapter
from starlette.authentication import AuthCredentials
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from pgmcp.errors import NodeNotReady
from pgmcp.protocol import SESSION_ID_HEADER
from pgmcp.session.adapter import RESTORED_HEADER, Adapted, Conversation, Incoming, Kind, Outgoing, Shared
from pgmcp.session.sdk.bus import bus_of
from pgmcp.session.sdk.json_in_strings import bound_parsing
from pgmcp.session.sdk.stateless import Stateless
from pgmcp.session.state import Hooks, current, hooks_of

_TEXTS = ("method", "scheme", "http_version", "path", "root_path")
_BYTES = ("raw_path", "query_string")

bound_parsing()


class _Reader:
    """The stream that the SDK reads; ``last_context`` is where its dispatcher looks for the sender's contextvars."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.last_context: contextvars.Context | None = None

    async def receive(self) -> SessionMessage | Exception:
        incoming = await self._conversation.receive()
        if incoming is None:
            raise StopAsyncIteration
        state = self._conversation.state
        request, self.last_context = _rebuild(incoming.context or _replayed(state.session_id))
        self.last_context.run(current.set, state)
        return SessionMessage(
            jsonrpc_message_adapter.validate_python(pydantic_core.from_json(incoming.body), by_name=False),
            _metadata(incoming, request),
        )

    __anext__ = receive

    def __aiter__(self) -> _Reader:
        return self

    async def aclose(self) -> None:
        return None

    async def __aenter__(self) -> _Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class _Writer:
    """The stream that the SDK writes: each message goes out in the task that wrote it, so nothing is buffered."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    async def send(self, item: SessionMessage, /) -> None:
        await self._conversation.emit(_outgoing(item))

    async def aclose(self) -> None:
        return None

    async def __aenter__(self) -> _Writer:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class SdkAdapter:
    """The ``Adapter`` for a low-level server of the SDK.

    Args:
        server: the low-level server; an ``MCPServer`` has one inside.
        hooks: what the server does with its own memory when a session moves.
    """

    def __init__(self, server: Server[Any], hooks: Hooks) -> None:
        self._server, self.hooks = server, hooks
        self._state: Any = None
        self._stateless: Stateless | None = None

    def lifespan(self, shared: Shared) -> AbstractAsyncContextManager[None]:
        """See ``Adapter.lifespan``."""
        return self._lifespan(shared)

    @asynccontextmanager
    async def _lifespan(self, shared: Shared) -> AsyncIterator[None]:
        async with self._server.lifespan(self._server) as self._state:
            stateless = Stateless(self._server, self._state, shared)
            async with stateless.running():
                self._stateless = stateless
                try:
                    yield
                finally:
                    self._stateless = None

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ``Adapter.answer``."""
        if self._stateless is None:
            message = "This node's server has not started, or has stopped; try again or ask another node."
            raise NodeNotReady(message)
        await self._stateless.answer(scope, receive, send)

    def end_streams(self) -> None:
        """See ``Adapter.end_streams``."""
        if self._stateless is not None:
            self._stateless.end_streams()

    async def converse(self, session_id: str, conversation: Conversation) -> None:
        """See ``Adapter.converse``."""
        await serve_loop(
            self._server,
            _Reader(conversation),
            _Writer(conversation),
            lifespan_state=self._state,
            session_id=session_id,
        )

    def describe(self, scope: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Adapter.describe``."""
        described: dict[str, Any] = {key: scope[key] for key in _TEXTS if key in scope}
        described |= {key: scope[key].decode("latin-1") for key in _BYTES if scope.get(key) is not None}
        described["headers"] = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]]
        described |= {key: list(scope[key]) for key in ("client", "server") if scope.get(key)}
        user = scope.get("user")
        if isinstance(user, AuthenticatedUser):
            token = user.access_token
            described["token"] = token.model_dump(mode="json")
            described["token_type"] = f"{type(token).__module__}:{type(token).__qualname__}"
            described["scopes"] = list(scope["auth"].scopes)
        return described


def adapted(served: object, path: str) -> Adapted | None:
    """An ``MCPServer`` or a low-level ``Server`` with its adapter; None for anything else.

    Args:
        path: where the endpoint will be.
    """
    if not isinstance(served, (MCPServer, Server)):
        return None
    whole = served.streamable_http_app(streamable_http_path=path)
    server = served.session_manager.app
    adapter = SdkAdapter(server, hooks_of(served))
    return Adapted(str(served.name), adapter, bus_of(server, getattr(served, "_subscriptions", None)), whole)


def _metadata(incoming: Incoming, request: Request) -> ServerMessageMetadata:
    return ServerMessageMetadata(
        request_context=request,
        close_sse_stream=incoming.close_stream,
        close_standalone_sse_stream=incoming.close_standalone,
        on_request_unanswered=incoming.unanswered,
        can_send_request=incoming.can_ask,
    )


def _replayed(session_id: str) -> Mapping[str, Any]:
    """What a message that the node itself replays came with: many servers know their sessions by the header."""
    headers = [[SESSION_ID_HEADER, session_id], [RESTORED_HEADER, "1"]]
    return {"method": "POST", "path": "/", "query_string": "", "headers": headers}


def _rebuild(context: Mapping[str, Any]) -> tuple[Request, contextvars.Context]:
    """The request as the handler would see it on the node where it arrived, and the context to run the handler in."""
    variables = contextvars.copy_context()
    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "state": {}}
    scope |= {key: context[key] for key in _TEXTS if key in context}
    scope |= {key: context[key].encode("latin-1") for key in _BYTES if key in context}
    scope["headers"] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in context["headers"]]
    scope |= {key: tuple(context[key]) for key in ("client", "server") if key in context}
    if "token" in context:
        user = AuthenticatedUser(_token(context["token"], context["token_type"]))
        scope["user"], scope["auth"] = user, AuthCredentials(context["scopes"])
        variables.run(auth_context_var.set, user)
    return Request(scope), variables


def _token(values: Mapping[str, Any], type_name: str) -> AccessToken:
    """Verifiers may return a subclass with fields of its own; it is rebuilt as what it was."""
    module, _, name = type_name.partition(":")
    kind: Any = importlib.import_module(module)
    for part in name.split("."):
        kind = getattr(kind, part, AccessToken)
    if not (isinstance(kind, type) and issubclass(kind, AccessToken)):
        kind = AccessToken
    token: AccessToken = kind.model_validate(values)
    return token


def _outgoing(item: SessionMessage) -> Outgoing:
    message, metadata = item.message, item.metadata
    # the model's model_dump_json decodes what is encoded again here: a second of the event loop for 60 MiB
    text = message.__pydantic_serializer__.to_json(message, by_alias=True, exclude_unset=True)
    related = metadata.related_request_id if isinstance(metadata, ServerMessageMetadata) else None
    belongs_to = None if related is None else json.dumps(related)
    if isinstance(message, JSONRPCRequest):
        return Outgoing(Kind.REQUEST, text, json.dumps(message.id), message.method, belongs_to)
    if isinstance(message, JSONRPCNotification):
        return Outgoing(Kind.NOTIFICATION, text, None, message.method, belongs_to)
    kind = Kind.ERROR if isinstance(message, JSONRPCError) else Kind.RESULT
    return Outgoing(kind, text, json.dumps(message.id), None, belongs_to)
