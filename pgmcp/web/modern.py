"""2026-07-28: exchanges without a session, answered where they arrive by the served server's own SDK.

One rule says to which era an exchange belongs: ``is_modern``.

Invariants:
- Nothing of it is stored, and neither lease nor incarnation is asked for: it goes on while the database is away, and
  while the node joins again.
- Its client's disconnect cancels it (2026-07-28, "Cancellation"), also while it waits for its turn; so does the end of
  the token that opened it, for nothing of it could be fetched later.
- It stands in the line of its caller: the principal, or, where nobody is known, the address. One caller has a share of
  the places only, of those for calls and of those for ``subscriptions/listen``.
- The SDK's parser gets no body whose contents were not found to be bounded (``json_limits``).

Failure handling: it dies with its node, and its client asks again. A node that leaves lets calls finish within the
drain limit, and ends ``subscriptions/listen`` streams with their result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from starlette.types import ASGIApp, Message, Scope

from pgmcp.clock import Clock
from pgmcp.errors import NodeNotReady
from pgmcp.protocol import LISTEN, METHOD_HEADER, VERSION_HEADER, revision_of
from pgmcp.web.admission import Admission
from pgmcp.web.bodies import Body
from pgmcp.web.connection import Watch
from pgmcp.web.endpoint import Front, Rules
from pgmcp.web.fair_shares import FairShares
from pgmcp.web.http_exchange import HttpExchange
from pgmcp.web.json_limits import json_limits_of
from pgmcp.web.json_rpc import Refusal
from pgmcp.web.token_expiry import TokenExpiry, expired

WAITING = 500
"""Exchanges of one caller that may wait for their turn."""

_VERSION = VERSION_HEADER.encode()


def is_modern(scope: Scope) -> bool:
    """Whether an exchange has no session: it names a protocol version, and none that begins with a handshake."""
    named = next((value for name, value in scope["headers"] if name == _VERSION), b"").strip().decode("latin-1")
    return bool(named) and not revision_of(named).handshake


@dataclass(eq=False, slots=True)
class _Open:
    scope: anyio.CancelScope
    listens: bool
    cut: bool = False

    @property
    def expired(self) -> bool:
        """Whether its token has expired, and so it was ended."""
        return self.scope.cancelled_caught and anyio.current_time() >= self.scope.deadline


class Modern(Front):
    """The endpoint as an ASGI application.

    Args:
        server: answers an exchange that has its turn; raises ``NodeNotReady`` while it cannot.
        admission: the node's turns.
        rules: whom and what it lets in.
    """

    def __init__(self, server: ASGIApp, admission: Admission, rules: Rules, clock: Clock) -> None:
        super().__init__(rules)
        self._server, self._admission, self._clock = server, admission, clock
        self._calls = FairShares(rules.settings.max_exchanges, "exchanges", clock)
        self._listens = FairShares(rules.settings.max_listens, f"{LISTEN} streams", clock)
        self._open: set[_Open] = set()

    @property
    def busy(self) -> int:
        """Open exchanges that end by themselves."""
        return sum(not opened.listens for opened in self._open)

    @property
    def open(self) -> int:
        """Open exchanges of any kind."""
        return len(self._open)

    def cut(self) -> None:
        """End at once what would end by itself: the node leaves without waiting for it."""
        for opened in self._open:
            if not opened.listens:
                opened.cut = True
                opened.scope.cancel()

    async def take(self, exchange: HttpExchange, body: Body) -> None:
        """See ``Front.take``."""
        limits = self._settings
        if body.small:
            json_limits_of(limits).check(body.text)
        with self._opened(exchange) as opened:
            answer = _Answer(exchange, body, opened.scope.cancel, lasts=opened.listens)
            with opened.scope:
                async with self._admission.turn(
                    exchange.caller,
                    None,
                    exchange.connection.receive,
                    kind="requests" if body.small else "large",
                    most=WAITING,
                    patience=limits.hold,
                ):
                    if not body.small:
                        await json_limits_of(limits).check_large(body.text)
                    with Watch(exchange.connection.receive, opened.scope.cancel):
                        await self._server(exchange.request.scope, answer.receive, answer.send)
            if opened.cut or opened.expired:
                await answer.end(expired() if opened.expired else None)

    @contextmanager
    def _opened(self, exchange: HttpExchange) -> Iterator[_Open]:
        """Hold a place of the caller; a header that says another method than the body is refused by the SDK."""
        listens = exchange.header(METHOD_HEADER) == LISTEN
        left = TokenExpiry(self._clock, exchange.expires_at).within(math.inf)
        opened = _Open(anyio.CancelScope(deadline=anyio.current_time() + left), listens)
        with (self._listens if listens else self._calls).held(exchange.caller):
            self._open.add(opened)
            try:
                yield opened
            finally:
                self._open.discard(opened)


class _Answer:
    """What the SDK sees of a connection: the body that was read already, and a client that reads in time or is gone.

    Args:
        lasts: it stays open, and its body is not to count for as long.
    """

    def __init__(self, exchange: HttpExchange, body: Body, on_gone: Callable[[], None], *, lasts: bool) -> None:
        self._connection, self._body, self._on_gone, self._lasts = exchange.connection, body, on_gone, lasts
        self._read = self._started = self._ended = False

    async def receive(self) -> Message:
        """The body, and then nothing: a disconnect cancels the whole exchange."""
        if self._read:
            await anyio.sleep_forever()
        self._read = True
        text, self._body.text = self._body.text, b""
        if self._lasts:
            self._body.drop()
        return {"type": "http.request", "body": text, "more_body": False}

    async def send(self, message: Message) -> None:
        """Pass on what is to be sent, to a client that reads it in time."""
        self._started = True
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._connection.send(message)
        if self._connection.gone:
            self._on_gone()

    async def end(self, why: Refusal | None) -> None:
        """End what was cut.

        Raises:
            Refusal: nothing was sent yet; that is the answer.
            NodeNotReady: the same, where there is none.
        """
        if not self._started:
            message = "This node is leaving; send the same request again."
            raise why or NodeNotReady(message)
        if not self._ended:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
