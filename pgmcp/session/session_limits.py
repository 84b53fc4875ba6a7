"""Limits of one session at its owner: what it may subscribe to, and what a request may say before its answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import sha256
from json import dumps

from pgmcp.protocol import CANCELLED, SUBSCRIBE
from pgmcp.session.adapter import Kind, Outgoing
from pgmcp.session.journal import subscription
from pgmcp.session.running_requests import RunningRequest, Stream, repeats

SUBSCRIPTIONS = 1_000
"""Resources that a session may be subscribed to: each is a row, and is replayed when the session is restored."""

SAID = 10_000
"""Notifications of unfinished requests that one stream keeps without further ado."""

SAID_BYTES = 64 * 1024 * 1024
"""Bytes that they may have."""

PACE_SECONDS = 1.0
"""Seconds between the notifications that are kept after that: progress still tells that somebody works."""


def too_many_subscriptions(
    request: RunningRequest, subscribed: Collection[str], running: Iterable[RunningRequest]
) -> str | None:
    """Why a request may not subscribe; None if it may, or is no subscription.

    Args:
        subscribed: the keys of what the session is subscribed to.
        running: what runs, this one too.
    """
    if request.method != SUBSCRIBE:
        return None
    asked = {_key(each) for each in running if each.method == SUBSCRIBE} - {_key(request)}
    if _key(request) in subscribed or len(asked | set(subscribed)) < SUBSCRIPTIONS:
        return None
    return f"This session has {SUBSCRIPTIONS} subscriptions; unsubscribe from one before you subscribe to another."


def _key(request: RunningRequest) -> str:
    return sha256(dumps(subscription(request.body)).encode()).hexdigest()


def gives_way(request: RunningRequest, outgoing: Outgoing, now: float) -> bool:
    """Whether what a server says for a request is not kept: answers, questions and cancels always are."""
    if repeats(request, outgoing):
        return True
    stream = request.stream
    if outgoing.kind is not Kind.NOTIFICATION or outgoing.method == CANCELLED or not stream.unfinished:
        return False  # the standalone stream, which HTTP+SSE uses for all, has a bound of its own
    if _full(stream) and now - stream.said_at < PACE_SECONDS:
        return True
    stream.said, stream.said_bytes, stream.said_at = stream.said + 1, stream.said_bytes + len(outgoing.message), now
    return False


def _full(stream: Stream) -> bool:
    return stream.said >= SAID or stream.said_bytes >= SAID_BYTES
