"""``requestState`` (2026-07-28) under keys that every node has.

The SDK seals what a server gives its client to bring back in the next round, and checks it: by default with a key that
it makes up for each process, so that only the process that sealed a state could open it. Here it seals with the
cluster's ring, under one audience on all nodes. A server that was given keys of its own keeps them.

Failure handling: a key that is not known yet is looked for once; while the database is away that is an internal error
and not a refusal, and the client may send the same again.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar
from weakref import WeakSet

from mcp import MCPError
from mcp.server import Server
from mcp.server.context import CallNext, HandlerResult, ServerMiddleware, ServerRequestContext
from mcp.server.request_state import (
    AESGCMRequestStateCodec,
    InvalidRequestState,
    RequestStateBoundary,
    RequestStateSecurity,
)
from mcp_types import INTERNAL_ERROR, INVALID_PARAMS
from mcp_types.methods import INPUT_REQUIRED_METHODS

from pgmcp.errors import DatabaseUnavailable, PgmcpError
from pgmcp.secret_box import StateBox

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PREFIX, PLACE, AUDIENCE = "pgmcp1.", b"request-state", "pgmcp"

SKEW_SECONDS = 60.0
"""Seconds by which the clocks of two nodes may differ."""

_chosen: WeakSet[RequestStateSecurity] = WeakSet()


def _watch_for_chosen_keys() -> None:
    """Know which keys were chosen: what the SDK makes up for servers that were given none looks the same."""
    init, ephemeral = RequestStateSecurity.__init__, RequestStateSecurity.ephemeral.__func__  # type: ignore[attr-defined]

    def chosen(self: RequestStateSecurity, **given: Any) -> None:
        init(self, **given)
        _chosen.add(self)

    def made_up(cls: type[RequestStateSecurity], /, **given: Any) -> RequestStateSecurity:
        made: RequestStateSecurity = ephemeral(cls, **given)
        _chosen.discard(made)
        return made

    RequestStateSecurity.__init__ = chosen  # type: ignore[method-assign]
    RequestStateSecurity.ephemeral = classmethod(made_up)  # type: ignore[method-assign, assignment]


_watch_for_chosen_keys()


class _Codec:
    """The SDK's ``RequestStateCodec`` with the cluster's ring."""

    def __init__(self, box: StateBox) -> None:
        self._box = box

    def seal(self, payload: bytes) -> str:
        return PREFIX + base64.urlsafe_b64encode(self._box.seal(payload, PLACE)).decode().rstrip("=")

    def unseal(self, token: str) -> bytes:
        try:
            return self._box.open_known(_sealed(token), PLACE)
        except PgmcpError as error:
            raise InvalidRequestState(str(error)) from error


class SharedStates:
    """Middleware of the SDK: its own boundary, with the cluster's ring.

    Args:
        box: the ring.
        once: whether a state may be used once only.
        like: lifetime and binding to the caller as in this one.
    """

    def __init__(self, box: StateBox, like: RequestStateSecurity, *, once: bool) -> None:
        self._box, self._once, self._life = box, once, like.ttl + SKEW_SECONDS
        security = RequestStateSecurity(
            codec=_Codec(box), ttl=like.ttl, bind_principal=like.bind_principal, audience=like.audience
        )
        self._boundary = RequestStateBoundary(security, default_audience=AUDIENCE)

    async def __call__(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        """Check what the client brought back, and seal what it is given."""
        token = (ctx.params or {}).get("requestState") if ctx.method in INPUT_REQUIRED_METHODS else None
        sealed = _sealed(token) if isinstance(token, str) else b""
        if not sealed:
            return await self._boundary(ctx, call_next)
        await self._in_time(self._box.learn(sealed))

        async def checked(ctx: ServerRequestContext[Any, Any]) -> HandlerResult:
            if self._once and not await self._in_time(self._box.spend(sealed, self._life)):
                logger.warning("requestState rejected on %s: it was used before", ctx.method)
                raise MCPError(INVALID_PARAMS, "Invalid or expired requestState", {"reason": "invalid_request_state"})
            return await call_next(ctx)

        return await self._boundary(ctx, checked)

    @staticmethod
    async def _in_time(asked: Awaitable[Answer]) -> Answer:
        try:
            return await asked
        except DatabaseUnavailable as error:
            raise MCPError(INTERNAL_ERROR, "The requestState cannot be checked now; send the same again.") from error


def with_shared_states(server: Server[Any], box: StateBox, *, once: bool) -> list[ServerMiddleware[Any]]:
    """A server's middleware, in which the cluster's keys have taken the place of made-up ones.

    Args:
        box: the cluster's ring.
        once: whether a state may be used once only.
    """
    return [_shared(each, box, once=once) for each in server.middleware]


def _shared(middleware: ServerMiddleware[Any], box: StateBox, *, once: bool) -> ServerMiddleware[Any]:
    if not isinstance(middleware, RequestStateBoundary):
        return middleware
    security = middleware._security  # noqa: SLF001 - nothing public says what a boundary was given
    if security not in _chosen and isinstance(security.codec, AESGCMRequestStateCodec):
        # also for keys that were chosen before pgmcp was imported: the ring serves as well
        return SharedStates(box, security, once=once)
    logger.info(
        "the server brings requestState security of its own, which it keeps: its keys must be the same on every node"
    )
    return middleware


def _sealed(token: str) -> bytes:
    """The bytes of a token; none when it is no token of ours."""
    if not token.startswith(PREFIX) or not token.isascii():
        return b""
    text = token[len(PREFIX) :]
    try:
        found = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return b""
    return found if base64.urlsafe_b64encode(found).decode().rstrip("=") == text else b""
