"""Restoring a session on a new owner.

A fresh server session is told the session's journal, as if the client had just said it; its answers are swallowed. Then
the questions that nobody asks any more are cancelled, what was in flight is run again or ended (``policy``), and last
comes what waits in the inbox.

Invariants:
- The client notices nothing but a pause: it never initializes again.
- Attempts and runs are stored before they are begun: a replay or a call that takes its node down does so twice or three
  times, and not for ever.
- Progress never goes backwards: a call that runs again is silent until it is further than the first run was.

Failure handling: a server that now speaks another protocol version ends the session, for its client would not notice.
Other differences of its InitializeResult are logged. A replay that fails is tried again, ``ATTEMPTS`` times in all.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pgmcp.errors import PgmcpError
from pgmcp.inheritance import Inheritance, Inherited
from pgmcp.ports import Takeovers
from pgmcp.protocol import CANCELLED, INITIALIZED, LIST_TOOLS, message_of
from pgmcp.session.actor import Actor
from pgmcp.session.policy import Fate, fate, undecided
from pgmcp.session.state import EXPORT, Hooks, SessionState
from pgmcp.types import Claimed, StreamId

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Restores that may fail before the session ends."""

IMPORT_SECONDS = 5.0
"""Seconds that a server may take to import its memory of a session."""

PAGES = 50
"""Pages of a server's tools that are read to find out which of them are harmless."""

REASON = "the node that asked is gone"
UNKNOWN = (
    "The node that ran this request is gone, and nobody knows whether it took effect. "
    "Find out, then send the request again under a new id."
)


class RestoreFailed(PgmcpError):
    """The session could not be restored this time."""


class SessionOver(PgmcpError):
    """The session cannot go on in this build; its client has to begin a new one."""


class Restore:
    """The restore of one session.

    Args:
        actor: the fresh server session, started.
        left: what the earlier owners left.
        rerun: tools that the operator allows to run again.
        hooks: what the server does with its own memory.
        deliver: gives a claimed message to the actor, after a last look at trust.
    """

    def __init__(
        self,
        actor: Actor,
        left: Inheritance,
        *,
        takeovers: Takeovers,
        rerun: Sequence[str],
        hooks: Hooks,
        deliver: Callable[[Actor, Claimed], Awaitable[None]],
    ) -> None:
        self._actor, self._left, self._takeovers = actor, left, takeovers
        self._rerun, self._hooks, self._deliver = rerun, hooks, deliver

    async def run(self) -> None:
        """Bring the session to where it was.

        Raises:
            SessionOver: this build cannot go on with it.
            RestoreFailed: not this time.
            Fenced: it has another owner by now.
            DatabaseUnavailable: not now.
        """
        await self._replay()
        fates = await self._fates()
        ownership = self._actor.ownership
        adopted = [(item.key, max(item.runs, 1) + (fate is Fate.AGAIN)) for item, fate in fates]
        await self._actor.writer.insist(lambda: self._takeovers.adopt(ownership, adopted))
        # nobody else ends what was adopted
        await self._actor.writer.insist(lambda: self._takeovers.restored(ownership, self._left))
        inherited = [(_claimed(item, self._actor), item, fate) for item, fate in fates]
        self._actor.expect([claimed for claimed, _, _ in inherited])
        await self._cancel_questions()
        for claimed, item, what in sorted(inherited, key=lambda each: each[2] is Fate.AGAIN):
            await self._settle(claimed, item, what)

    async def _replay(self) -> None:
        """Tell the server what its client has said that still holds."""
        entries = {entry.kind: entry.body for entry in self._left.journal if entry.body is not None}
        if "initialize" in entries and "result" in entries:  # else it has no answer, and is among what is in flight
            answer = await self._ask(entries["initialize"])
            if "error" in answer:
                message = f"The server refused the handshake that it accepted before ({answer['error'].get('code')})"
                raise RestoreFailed(message)
            self._compare(json.loads(entries["result"])["result"], answer["result"])
        initialized = entries.get("initialized") or self._claimed_initialized()
        if initialized is not None:
            self._actor.tell(initialized)
            self._actor.change_notices.begin()
        for entry in self._left.journal:
            self._actor.change_notices.note(entry)
            if entry.kind in {"level", "subscription"} and entry.body is not None:
                answer = await self._ask(entry.body)
                if "error" in answer:
                    logger.warning(
                        "session %s: the restored server refused a %s that it had taken before (code %s)",
                        self._actor.alias,
                        entry.kind,
                        answer["error"].get("code"),
                    )
        if self._hooks.restore is not None:
            await self._import(self._hooks.restore, entries.get(EXPORT))

    async def _import(self, restore: Callable[[SessionState, Any], Awaitable[None]], exported: bytes | None) -> None:
        try:
            async with asyncio.timeout(IMPORT_SECONDS):
                await restore(self._actor.state, None if exported is None else json.loads(exported))
        except TimeoutError:
            message = f"The server did not import its memory of the session within {IMPORT_SECONDS} s"
            raise RestoreFailed(message) from None

    def _claimed_initialized(self) -> bytes | None:
        """The end of the handshake, when the former owner took it and died before it wrote it down."""
        return next(
            (said.body for said in self._left.heard if said.method == INITIALIZED and said.claimed),
            None,
        )

    def _compare(self, recorded: dict[str, Any], answered: dict[str, Any]) -> None:
        version = recorded.get("protocolVersion")
        if answered.get("protocolVersion") != version:
            message = f"This build answers {answered.get('protocolVersion')} to a client that speaks {version}"
            raise SessionOver(message)
        self._actor.speaks(str(version))
        if answered != recorded:
            changed = sorted(key for key in recorded | answered if recorded.get(key) != answered.get(key))
            logger.warning(
                "session %s goes on with another %s than its client was told, and the client does not know",
                self._actor.alias,
                ", ".join(_told(key, recorded.get(key), answered.get(key)) for key in changed),
            )

    async def _ask(self, body: bytes) -> dict[str, Any]:
        try:
            return await self._actor.ask(json.loads(body))
        except TimeoutError:
            message = "The server did not answer the replay of what its client had said"
            raise RestoreFailed(message) from None

    async def _fates(self) -> list[tuple[Inherited, Fate]]:
        requests = self._left.requests
        harmless = await self._harmless() if undecided(requests, self._rerun) else frozenset()
        return [(request, fate(request, self._left.heard, self._rerun, harmless)) for request in requests]

    async def _harmless(self) -> frozenset[str]:
        """The tools that say of themselves that they only read, or may be repeated."""
        found: set[str] = set()
        params: dict[str, Any] = {}
        for _ in range(PAGES):
            answer = await self._ask(json.dumps(message_of(LIST_TOOLS, params)).encode())
            result = answer.get("result") or {}
            for tool in result.get("tools", ()):
                notes = tool.get("annotations") or {}
                if notes.get("readOnlyHint") is True or notes.get("idempotentHint") is True:
                    found.add(tool["name"])
            if not result.get("nextCursor"):
                break
            params = {"cursor": result["nextCursor"]}
        return frozenset(found)

    async def _cancel_questions(self) -> None:
        """Cancel, where they were asked, the questions of owners that cannot hear the answers any more."""
        over: set[Any] = {json.loads(said.body).get("id") for said in self._left.heard if said.method is None}
        asked: list[tuple[StreamId, Any]] = []
        for stream, text in self._left.said:
            message = json.loads(text)
            if message.get("method") == CANCELLED:
                over.add((message.get("params") or {}).get("requestId"))
            elif "id" in message and "method" in message:
                asked.append((stream, message["id"]))
        for stream, question in asked:
            if question not in over:
                await self._actor.withdraw(stream, question, REASON)

    async def _settle(self, claimed: Claimed, item: Inherited, what: Fate) -> None:
        match what:
            case Fate.AGAIN:
                self._actor.silence_until(item.rpc_id, self._progress(item))
                await self._deliver(self._actor, claimed)
            case Fate.CANCELLED:
                await self._actor.cancel(claimed)
            case Fate.LOST:
                data = {"reason": "owner_lost", "outcome": "unknown", "runs": max(item.runs, 1)}
                await self._actor.reject(claimed, UNKNOWN, data)

    def _progress(self, item: Inherited) -> float | None:
        """How far the first run said that it was."""
        token = ((json.loads(item.body).get("params") or {}).get("_meta") or {}).get("progressToken")
        reached = [
            params["progress"]
            for stream, text in self._left.said
            if (stream == item.stream or item.stream is None) and token is not None
            for params in [json.loads(text).get("params") or {}]
            if params.get("progressToken") == token and isinstance(params.get("progress"), (int, float))
        ]
        return max(reached, default=None)


def _told(key: str, before: Any, now: Any) -> str:
    """What the log says of a changed part of InitializeResult: of capabilities which, of the rest only its name."""
    if key != "capabilities" or not isinstance(before, dict) or not isinstance(now, dict):
        return key
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    return f"{key} ({', '.join(names)})"


def _claimed(item: Inherited, actor: Actor) -> Claimed:
    return Claimed(
        item.key, actor.ownership, item.rpc_id, item.method, item.body, item.context, item.stream, item.next_seq
    )
