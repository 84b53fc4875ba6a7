"""The actor: one live server session on its owner.

Invariants:
- Every message that the server writes is stored, under the actor's ownership, before anybody hears of it (G2).
- A message goes to exactly one stream: an answer and what belongs to a request to the request's stream, everything
  else to the standalone one.
- What a handshake or a standing wish of the client establishes is in the journal before its answer is stored.
- What the node itself asks a server session (a restore's replay) is answered to the node and nobody else.
- A muted actor says nothing more. The SDK answers a stopping session's open requests with errors of its own, so an
  actor is muted before it is stopped.

Failure handling: a refused write mutes the actor at once: its ownership is over, or it has lost step with the tables
and its session is restored from them. What only the database's absence holds up is written when it is back, however
long that takes: what was claimed ends in no other way. A server that crashes or ends the session by itself ends it for
its client too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pgmcp.clock import Clock, Ids
from pgmcp.errors import Fenced, PgmcpError
from pgmcp.ports import Inbox, Log
from pgmcp.protocol import (
    CANCELLED,
    INITIALIZE,
    INTERNAL_ERROR,
    INVALID_REQUEST,
    PROGRESS,
    REQUEST_CANCELLED,
    error_of,
    message_of,
    revision_of,
)
from pgmcp.session.adapter import Adapter, Incoming, Kind, Outgoing
from pgmcp.session.change_notices import ChangeNotices
from pgmcp.session.coalescing import topic_of
from pgmcp.session.event_appender import EventAppender
from pgmcp.session.fenced_writer import FencedWriter
from pgmcp.session.journal import handshake, journal_entries
from pgmcp.session.journal_writer import JournalWriter
from pgmcp.session.message_limit import MessageLimit
from pgmcp.session.node_requests import NodeRequests
from pgmcp.session.outbox import Outbox
from pgmcp.session.recent_ids import RecentIds
from pgmcp.session.request_context import RequestContext
from pgmcp.session.running_requests import ActorEnd, RunningRequest, Stream
from pgmcp.session.server_requests import ServerRequests, dump
from pgmcp.session.session_limits import gives_way, too_many_subscriptions
from pgmcp.session.state import SessionState
from pgmcp.types import (
    Claimed,
    JournalEntry,
    NodeId,
    Outcome,
    Ownership,
    RequestKey,
    Stand,
    StreamId,
    session_alias,
)

logger = logging.getLogger(__name__)

STOP_SECONDS = 2.0
"""Seconds that a stopped server session may take to unwind."""


class Actor:
    """One session's live server session.

    Args:
        ownership: the right under which everything is stored.
        state: what the server's code knows and keeps of the session.
        standalone: the session's standalone stream and its next number.
        wake_sink: called with sink and stream after an event was stored there.
        version: the number of the newest write of the session's journal; None for a new session.
        on_over: called once, when it has come to an end by itself.
    """

    def __init__(
        self,
        ownership: Ownership,
        state: SessionState,
        standalone: tuple[StreamId, int],
        *,
        adapter: Adapter,
        inbox: Inbox,
        log: Log,
        clock: Clock,
        ids: Ids,
        message_limit: MessageLimit,
        wake_sink: Callable[[NodeId, StreamId], None],
        version: int | None,
        on_over: Callable[[Actor, ActorEnd], None],
    ) -> None:
        self.session_id, self.alias, self.state = state.session_id, session_alias(state.session_id), state
        self.writer = FencedWriter(ownership, clock, lambda: not self._muted)
        self.journal_writer = JournalWriter(inbox, self.writer, version)
        self._adapter, self._log, self._clock = adapter, log, clock
        self._message_limit, self._wake_sink, self._on_over = message_limit, wake_sink, on_over
        self.outbox = Outbox(Stream(*standalone))
        self.appender = EventAppender(self.outbox, self.writer, log, wake_sink, self._refused)
        self._standalone, self._streams = self.outbox.standalone, self.outbox.streams
        self._running: dict[str, RunningRequest] = {}
        self._working: set[RequestKey] = set()
        self._server_requests = ServerRequests(ids)
        self.change_notices = ChangeNotices(self.emit)
        self._floors: dict[str, float | None] = {}
        self._early_cancels = RecentIds(clock)  # those that overtook their requests
        self._finished = RecentIds(clock)  # a late cancel must not hit the next request that has the id
        self._answered = RecentIds(clock)
        self._queue: asyncio.Queue[Incoming | None] = asyncio.Queue()
        self._node_requests = NodeRequests(ids, self._queue.put_nowait)
        self._closable = self._muted = False
        self._task: asyncio.Task[None] | None = None
        self._establishing: set[asyncio.Task[None]] = set()

    @property
    def ownership(self) -> Ownership:
        """The right under which everything is stored; its epoch changes with the term."""
        return self.writer.ownership

    def start(self) -> None:
        """Begin the server session."""
        self._task = asyncio.create_task(self._run(), name=f"session {self.alias}")

    async def _run(self) -> None:
        try:
            await self._adapter.converse(self.session_id, self)
        except Exception:
            logger.exception("the server's code for session %s crashed; the session ends", self.alias)
        finally:
            self._node_requests.fail()
            self._lose(ActorEnd.ENDED)

    def mute(self) -> None:
        """Say nothing more from now on."""
        self._muted = True
        self.change_notices.stop()
        self.appender.stop()

    @property
    def busy(self) -> bool:
        """Whether it works on something: a request, a message that waits, an event that is being stored."""
        return bool(self._running or self.outbox.storing or not self._queue.empty())

    async def stop(self) -> None:
        """Mute and end the server session."""
        self.mute()
        if self._task is None or self._task.done():
            return
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=STOP_SECONDS)

    def speaks(self, version: str) -> None:
        """Note the protocol version that the handshake settled."""
        self._closable = revision_of(version).resumes

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send the server a request of the node's own; its answer (see ``NodeRequests.ask``)."""
        return await self._node_requests.ask(request)

    def tell(self, notification: bytes) -> None:
        """Send the server a notification of the node's own."""
        self._queue.put_nowait(Incoming(notification))

    async def withdraw(self, stream: StreamId, question: object, reason: str) -> None:
        """Cancel a question that an earlier owner asked on a stream, or on the standalone one."""
        where = self._standalone if stream == self._standalone.id else self._streams.get(stream)
        if where is not None and not self._muted:
            params = {"requestId": question, "reason": reason}
            cancel = dump(message_of(CANCELLED, params))
            await asyncio.shield(self.appender.store(where, cancel))

    def silence_until(self, rpc_id: str, progress: float | None) -> None:
        """A request that runs again says nothing of its progress before it is further than it was."""
        self._floors[rpc_id] = progress

    def has(self, key: RequestKey) -> bool:
        """Whether a request is being worked on, or was answered here a moment ago.

        A crash of PostgreSQL may forget its claim, and give it out anew; the reply may come when it has been answered.
        """
        return key in self._working or str(key) in self._answered

    def expect(self, claimed: Sequence[Claimed]) -> None:
        """Count the requests of each stream before the first of them can be finished: a batch shares one."""
        self._working.update(message.key for message in claimed if message.rpc_id is not None)
        for message in claimed:
            if message.rpc_id is not None and message.stream is not None:
                stream = self._streams.setdefault(message.stream, Stream(message.stream, message.next_seq))
                stream.unfinished += 1

    async def deliver(self, claimed: Claimed, context: RequestContext) -> None:
        """Hand one claimed and expected message to the server; messages must come in inbox order."""
        if self._muted:
            return
        if claimed.rpc_id is not None:
            await self._deliver_request(claimed, claimed.rpc_id, context)
        elif claimed.method is None:
            self._pass_on(self._server_requests.answer(json.loads(claimed.body)), context)
        elif claimed.method == CANCELLED:
            self._deliver_cancel(claimed.body, context)
        elif claimed.method == PROGRESS:
            self._pass_on(self._server_requests.progress(json.loads(claimed.body)), context)
        else:
            for entry in journal_entries(claimed.method, claimed.body, None):
                await self._write_journal(entry)
            self._pass_on(claimed.body, context)

    def _pass_on(self, body: bytes | None, context: RequestContext) -> None:
        if body is not None:
            self._queue.put_nowait(Incoming(body, context.described, close_standalone=self._closer(None)))

    async def _deliver_request(self, claimed: Claimed, rpc_id: str, context: RequestContext) -> None:
        stream = self._register(claimed, rpc_id, claimed.stream, can_ask=context.can_ask)
        if self._early_cancels.take(rpc_id):
            await self._cancelled(rpc_id)
        elif refusal := too_many_subscriptions(
            self._running[rpc_id], self.change_notices.subscribed, self._running.values()
        ):
            await self._refuse(rpc_id, INVALID_REQUEST, refusal, Outcome.ANSWERED)
        else:
            incoming = Incoming(
                claimed.body,
                context.described,
                can_ask=context.can_ask,
                unanswered=lambda: self._cancelled(rpc_id),
                close_stream=None if claimed.stream is None else self._closer(stream.id),
                close_standalone=None if claimed.stream is None else self._closer(None),  # HTTP+SSE cannot resume
            )
            self._queue.put_nowait(incoming)

    def _register(self, claimed: Claimed, rpc_id: str, stream_id: StreamId | None, *, can_ask: bool) -> Stream:
        stream = self._standalone if stream_id is None else self._streams[stream_id]  # HTTP+SSE has but one
        floor = self._floors.pop(rpc_id, None)
        self._running[rpc_id] = RunningRequest(claimed.key, claimed.method or "", claimed.body, stream, can_ask, floor)
        return stream

    async def reject(self, claimed: Claimed, text: str, data: dict[str, Any] | None = None) -> None:
        """Answer a claimed and expected request with an error, without the server; drop what is no request."""
        if claimed.rpc_id is not None:
            self._register(claimed, claimed.rpc_id, claimed.stream, can_ask=False)
            await self._refuse(claimed.rpc_id, INTERNAL_ERROR, text, Outcome.LOST, data)

    async def cancel(self, claimed: Claimed) -> None:
        """End a claimed and expected request that its client has cancelled."""
        if claimed.rpc_id is not None:
            self._register(claimed, claimed.rpc_id, claimed.stream, can_ask=False)
            await self._cancelled(claimed.rpc_id)

    def _deliver_cancel(self, body: bytes, context: RequestContext) -> None:
        rpc_id = json.dumps((json.loads(body).get("params") or {}).get("requestId"))
        if rpc_id in self._running:
            if self._running[rpc_id].method != INITIALIZE:
                self._pass_on(body, context)
        elif rpc_id not in self._finished:
            self._early_cancels.keep(rpc_id)

    async def receive(self) -> Incoming | None:
        """See ``Conversation.receive``."""
        return await self._queue.get()

    async def emit(self, outgoing: Outgoing) -> None:
        """See ``Conversation.emit``."""
        if self._muted:
            return
        outgoing = self._message_limit.fitting(outgoing)
        if outgoing.kind in {Kind.RESULT, Kind.ERROR}:
            await self._answer(outgoing)
            return
        await self.appender.room()  # up to here its sayer may give up; from here on nothing comes between
        if self._muted:
            return
        stream = self._standalone
        if outgoing.related is not None:
            request = self._running.get(outgoing.related)
            if request is None or not request.can_ask or gives_way(request, outgoing, self._clock.boottime()):
                return  # answered already, or answered by plain JSON: there is nowhere to say it
            stream = request.stream
        message: bytes | None = outgoing.message
        if outgoing.kind is Kind.REQUEST:
            message = self._server_requests.ask(outgoing.message)
        elif outgoing.method == CANCELLED:
            message = self._server_requests.cancel(outgoing.message)
        if message is not None:
            topic = topic_of(outgoing, stream.next_seq) if stream is self._standalone else None
            await asyncio.shield(self.appender.store(stream, message, topic=topic))

    async def _answer(self, outgoing: Outgoing) -> None:
        rpc_id = outgoing.rpc_id or ""
        if self._node_requests.take(rpc_id, outgoing.message):
            return
        request = self._running.get(rpc_id)
        if request is None:
            return
        entries = (
            journal_entries(request.method, request.body, outgoing.message) if outgoing.kind is Kind.RESULT else []
        )
        if entries:
            task = asyncio.create_task(self._establish(rpc_id, request, entries, outgoing.message))
            self._establishing.add(task)
            task.add_done_callback(self._establishing.discard)
            await asyncio.shield(task)  # the answer is the actor's: whoever gave it may go
        else:
            await self._finish(rpc_id, request, outgoing.message, Outcome.ANSWERED)

    async def _establish(
        self, rpc_id: str, request: RunningRequest, entries: Sequence[JournalEntry], result: bytes
    ) -> None:
        try:
            if request.method == INITIALIZE:
                settled = handshake(request.body, result)
                self.speaks(settled.protocol_version)
                await self.journal_writer.establish(settled)
            for entry in entries:
                await self._write_journal(entry)
        except PgmcpError as error:
            self._refused(error)
        else:
            await self._finish(rpc_id, request, result, Outcome.ANSWERED)

    async def _write_journal(self, entry: JournalEntry) -> None:
        await self.journal_writer.write(entry)
        self.change_notices.note(entry)

    @property
    def muted(self) -> bool:
        """Whether it says nothing more."""
        return self._muted

    @property
    def working(self) -> frozenset[RequestKey]:
        """The requests that it works on, until their answers are stored."""
        return frozenset(self._working)

    def go_on(self, ownership: Ownership, stands: Mapping[StreamId, Stand], jump: int) -> None:
        """Go on in another term of the database: under its epoch, with its numbers."""
        self.outbox.go_on(stands, jump)
        self.writer.ownership = ownership

    async def _cancelled(self, rpc_id: str) -> None:
        await self._refuse(rpc_id, REQUEST_CANCELLED, "Request cancelled", Outcome.CANCELLED)

    async def _refuse(
        self, rpc_id: str, code: int, text: str, outcome: Outcome, data: dict[str, Any] | None = None
    ) -> None:
        request = self._running.get(rpc_id)
        if request is not None:
            await self._finish(rpc_id, request, dump(error_of(rpc_id, code, text, data)), outcome)

    def _finish(self, rpc_id: str, request: RunningRequest, message: bytes, outcome: Outcome) -> Awaitable[None]:
        """End a request, which has its number when this returns; done when that is stored."""
        if self._muted or self._running.get(rpc_id) is not request:
            return asyncio.sleep(0)  # it was cancelled while its answer was being established
        del self._running[rpc_id]
        self._finished.keep(rpc_id)
        request.stream.unfinished -= 1
        if request.stream.unfinished == 0:
            self._streams.pop(request.stream.id, None)
        task = self.appender.store(request.stream, message, request.key, outcome)
        task.add_done_callback(lambda _: self._has_answered(request.key))
        return asyncio.shield(task)

    def _has_answered(self, key: RequestKey) -> None:
        self._working.discard(key)
        self._answered.keep(str(key))

    def _refused(self, error: PgmcpError) -> None:
        if not self._muted:
            logger.warning("session %s is stopped here: %s", self.alias, error)
        self._lose(ActorEnd.FENCED if isinstance(error, Fenced) else ActorEnd.OUT_OF_STEP)

    def _lose(self, how: ActorEnd) -> None:
        if not self._muted:
            self.mute()
            self._on_over(self, how)

    def _closer(self, stream: StreamId | None) -> Callable[[], Awaitable[None]] | None:
        """What lets the server close a connection, for clients that know to come back."""
        return (lambda: self._close_stream(stream)) if self._closable else None

    async def _close_stream(self, stream: StreamId | None) -> None:
        with contextlib.suppress(PgmcpError):
            dropped = await self.writer.use(lambda: self._log.drop_sink(self.ownership, stream))
            if dropped is not None and dropped[1] is not None:
                self._wake_sink(dropped[1], dropped[0])
