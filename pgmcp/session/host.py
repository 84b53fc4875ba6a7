"""The host: the actors of one node, which ``Intake`` feeds from the inbox.

Invariants:
- A session that was taken over is restored before it takes messages; a few at a time.
- What a wake-up missed is found by ``poll`` (messages, takeovers) and ``survey`` (ends).

Failure handling: a write that the fence refuses means that the ownership is over: the actor is muted, then stopped. A
write that is refused for another reason means that the actor has lost step with the tables: its session is restored
from them, here. A server session that ends by itself is ended for its client too, on every node. A restore that fails
leaves the session without an actor; ``poll`` begins another one, until its attempts are used up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from pgmcp.clock import Clock, Ids
from pgmcp.errors import ClusterFull, DatabaseUnavailable, Fenced, PgmcpError, TooManySessions, told, unknown
from pgmcp.inheritance import Inheritance
from pgmcp.ports import Inbox, Log, Takeovers
from pgmcp.secret_box import SecretBox
from pgmcp.service import Faults, OnDemand, Service, Tasks
from pgmcp.session import timeline
from pgmcp.session.actor import Actor
from pgmcp.session.actor_factory import ActorFactory
from pgmcp.session.adapter import Adapter
from pgmcp.session.change_notices import ChangeNotices
from pgmcp.session.intake import Intake, Resident
from pgmcp.session.lost_claims import put_back
from pgmcp.session.message_limit import MessageLimit
from pgmcp.session.restore import ATTEMPTS, Restore, RestoreFailed, SessionOver
from pgmcp.session.running_requests import ActorEnd
from pgmcp.session.session_end import end_session
from pgmcp.settings import Settings
from pgmcp.types import NewSession, NodeId, Ownership, SessionKey, StreamId, session_alias

logger = logging.getLogger(__name__)

OPENINGS = 5
"""Times that room is made for a new session."""

RESTORES = 8
"""Sessions that are restored at the same time."""


class Host(Service):
    """The live server sessions of one incarnation of a node.

    Args:
        trusted: asked before messages are handed over; returns when the node may act, raises ``Fenced``.
        wake_sink: called with sink and stream after an event was stored.
        tell_ended: called with each session that this host has ended, whoever owned it.
        faults: counts unexpected errors of a single session; the rounds find what was left undone.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        inbox: Inbox,
        log: Log,
        takeovers: Takeovers,
        box: SecretBox,
        settings: Settings,
        clock: Clock,
        ids: Ids,
        trusted: Callable[[], Coroutine[Any, Any, None]],
        wake_sink: Callable[[NodeId, StreamId], None],
        tell_ended: Callable[[SessionKey], None],
        faults: Faults,
    ) -> None:
        self._hooks, self._inbox, self._log = adapter.hooks, inbox, log
        self._takeovers, self._settings, self._clock = takeovers, settings, clock
        self._trusted, self._wake_sink, self._tell_ended = trusted, wake_sink, tell_ended
        self._residents: dict[SessionKey, Resident] = {}
        self._restoring: set[SessionKey] = set()
        self._looks = OnDemand(self.poll, clock)
        self._missing: set[Ownership] = set()
        self._again: set[Ownership] = set()
        self.unsettled = False
        """Whether the database follows another timeline, and what lives here was not yet brought in line with it."""
        self._actor_factory = ActorFactory(
            adapter, inbox, log, clock, ids, wake_sink, self.over, MessageLimit(settings.max_message)
        )
        self._room = asyncio.Semaphore(RESTORES)
        self._tasks = Tasks("work for one session", faults)
        self._intake = Intake(
            self._residents,
            inbox=inbox,
            box=box,
            clock=clock,
            trusted=trusted,
            tasks=self._tasks,
            on_fenced=self.drop,
            on_over=self.over,
        )

    @property
    def sessions(self) -> int:
        """Live server sessions here, and those that are being restored."""
        return len(self._residents.keys() | self._restoring)

    @property
    def actors(self) -> dict[SessionKey, Actor]:
        """The live server sessions, as they are now."""
        return {session: resident.actor for session, resident in self._residents.items()}

    @property
    def under_way(self) -> int:
        """Pieces of work for single sessions that are under way: claims, restores, ends."""
        return len(self._tasks)

    @property
    def change_notices(self) -> list[ChangeNotices]:
        """What to tell of publications, for each live server session."""
        return [resident.actor.change_notices for resident in self._residents.values()]

    async def open(self, new: NewSession) -> Ownership:
        """Create a session here and start its actor.

        Raises:
            DatabaseUnavailable: it could not be committed in time.
            ClusterFull: too many sessions in all, and none makes room.
            TooManySessions: too many of this caller, and none makes room.
        """
        ownership = await self._opened(new)
        self.drop(ownership.session)  # one that a failover has lost may have had this key
        self._settle(self._actor_factory.make(ownership, new.session_id, (new.standalone, 1)))
        return ownership

    async def _opened(self, new: NewSession) -> Ownership:
        for _ in range(OPENINGS):  # others may take the place that was made
            try:
                return await self._inbox.open_session(new)
            except (ClusterFull, TooManySessions):
                for ended in await self._inbox.make_room(new.principal, new.address):
                    self._tell_ended(ended)
        return await self._inbox.open_session(new)

    def _settle(self, actor: Actor, *, taking: bool = False) -> Resident:
        resident = self._residents[actor.ownership.session] = Resident(actor, taking=taking)
        actor.start()
        return resident

    def take_on(self, ownership: Ownership) -> None:
        """Restore a session that this node has taken over; harmless while that is done already."""
        if self.unsettled:
            self._again.add(ownership)  # of what lives here, some may go on under the epochs of the new term
            return
        session = ownership.session
        resident = self._residents.get(session)
        if session not in self._restoring and (resident is None or resident.actor.ownership.epoch < ownership.epoch):
            self._restoring.add(session)
            self._tasks.spawn(self._restore(ownership))

    async def _restore(self, ownership: Ownership) -> None:
        session, alias = ownership.session, "that came here"
        try:
            async with self._room:
                await self._trusted()
                left = await self._takeovers.inherit(ownership)
                alias = session_alias(left.session_id)
                self.drop(session)  # what was here of an earlier epoch; not before the tables have confirmed this one
                if left.attempt > ATTEMPTS or self._settings.on_owner_change == "end":
                    logger.warning("session %s ends: it could not be restored, or is not to be", alias)
                    await self._end(ownership, alias)
                    return
                await self._revive(ownership, left)
                logger.info("session %s goes on here in epoch %d", alias, ownership.epoch)
        except SessionOver as over:
            logger.warning("session %s ends: %s", alias, over)
            self.drop(session, only=ownership)
            await self._end(ownership, alias)
        except Fenced as error:
            logger.info("session %s is over here in epoch %d: %s", alias, ownership.epoch, error)
            self.drop(session, only=ownership)
        except Exception as error:
            level = logging.DEBUG if isinstance(error, DatabaseUnavailable) else logging.WARNING
            logger.log(level, "session %s was not restored this time: %s", alias, told(error), exc_info=unknown(error))
            self.drop(session, only=ownership)
            self._again.add(ownership)
        finally:
            self._restoring.discard(session)

    async def _revive(self, ownership: Ownership, left: Inheritance) -> None:
        actor = self._actor_factory.make(ownership, left.session_id, (left.standalone, left.next_seq), left)
        resident = self._settle(actor, taking=True)
        restore = Restore(
            actor,
            left,
            takeovers=self._takeovers,
            rerun=self._settings.rerun,
            hooks=self._hooks,
            deliver=self._intake.deliver,
        )
        try:
            await restore.run()
            if actor.muted:
                message = "what it said while it was restored was refused"
                raise RestoreFailed(message)
        except Exception:
            actor.mute()
            await actor.appender.settled()  # the next attempt reads what this one has said
            raise
        for sink, stream in left.sinks:
            self._wake_sink(sink, stream)  # whoever wrote there last may have died before it said so
        actor.change_notices.missed(left.changed)
        resident.taking = False
        self.wake(ownership.session)

    def wake(self, session: SessionKey) -> None:
        """A session's inbox may have messages."""
        resident = self._residents.get(session)
        if resident is not None:
            self._intake.wake(resident)
        elif session not in self._restoring:
            self.look()  # the reply to a takeover was lost, or a restore failed

    def look(self) -> None:
        """Poll now; once more if that is being done."""
        self._looks.want()

    async def run(self) -> None:
        """Poll whenever that is wanted, for ever."""
        await self._looks.run()

    def has(self, session: SessionKey) -> bool:
        """Whether a session lives here."""
        return session in self._residents

    def drop(self, session: SessionKey, *, only: Ownership | None = None) -> None:
        """A session is over, or an ownership of it is: stop its actor without another word."""
        resident = self._residents.get(session)
        if resident is not None and only in {None, resident.actor.ownership}:
            del self._residents[session]
            resident.actor.mute()
            self._tasks.spawn(resident.actor.stop())

    async def poll(self) -> None:
        """Look for messages that no wake-up announced, and for takeovers whose reply was lost.

        Raises:
            DatabaseUnavailable: not now.
        """
        if self.unsettled:
            return
        again, self._again = self._again, set()
        for ownership in again:
            self.take_on(ownership)
        for ownership in await self._inbox.unclaimed():
            resident = self._residents.get(ownership.session)
            if resident is not None and resident.actor.ownership == ownership:
                self.wake(ownership.session)
            else:
                self.take_on(ownership)

    async def survey(self) -> None:
        """Set right what was not heard of: sessions that ended, went elsewhere or came here, claims that nobody got.

        Raises:
            DatabaseUnavailable: not now.
        """
        if self.unsettled:
            return
        owned = await self.drop_strangers()
        missing = owned - {resident.actor.ownership for resident in self._residents.values()}
        for ownership in missing & self._missing:  # one that is just being opened is missing once
            self.take_on(ownership)
        self._missing = missing
        for session in await put_back(self._inbox, self._residents):
            self.wake(session)

    async def drop_strangers(self) -> set[Ownership]:
        """Drop the sessions that are over or went elsewhere; those that are this node's.

        Raises:
            DatabaseUnavailable: not now.
        """
        before = [resident.actor.ownership for resident in self._residents.values()]
        owned = await self._inbox.owned()
        for ownership in [] if self.unsettled else before:
            if ownership not in owned:
                self.drop(ownership.session, only=ownership)  # it may have gone on in a new term meanwhile
        return owned

    async def go_on(self, jump: int, lasts: Callable[[], bool]) -> None:
        """Bring what lives here in line with a database that follows another timeline: see ``timeline.go_on``."""
        actors = [each.actor for session, each in self._residents.items() if session not in self._restoring]
        former = {actor.ownership.session: actor.ownership for actor in actors}
        leaving, owned = await timeline.go_on(actors, self._inbox, self._log, jump, lasts)
        self.unsettled = False
        for session in leaving:
            self.drop(session, only=former[session])
            if session in owned:
                self.take_on(owned[session])
        self._again = {owned.get(ownership.session, ownership) for ownership in self._again}
        self._again |= {owned[session] for session in self._restoring & owned.keys()}  # what restores them is fenced
        self.look()

    def hold(self) -> None:
        """Start no more requests: they wait for their session's next owner. What serves running ones still comes in."""
        self._intake.hold()

    def movable(self, *, busy: bool) -> list[SessionKey]:
        """The sessions that can be given away now; those that work on something only if ``busy``."""
        return [
            session
            for session, resident in self._residents.items()
            if not resident.taking and (busy or not (resident.dirty or resident.actor.busy))
        ]

    async def hand_over(self, session: SessionKey, to: NodeId, *, busy: bool) -> Ownership | None:
        """Give a session to another node; None when that cannot be done now.

        Args:
            busy: also while it works on something: its new owner treats that as after a death.
        """
        resident = self._residents.get(session)
        if resident is None or resident.taking:
            return None
        resident.taking = True  # claims wait, and are the next owner's
        actor, moved = resident.actor, None
        try:
            await actor.state.export(self._hooks)
            if busy or not actor.busy:
                actor.mute()
                moved = await self._takeovers.hand_over(actor.ownership, to)
                if moved is None:
                    self._anew(actor)
                else:
                    self.drop(session, only=actor.ownership)
        except PgmcpError as error:
            logger.warning("session %s was not handed over: %s", actor.alias, error)
            self._anew(actor)  # unless it was, after all: then that ownership is over
        finally:
            resident.taking = False
        if resident.dirty:
            self.wake(session)
        return moved

    async def export(self) -> None:
        """Have the server export what it remembers of each session, for their next owners."""
        for resident in list(self._residents.values()):
            await resident.actor.state.export(self._hooks)

    def mute(self) -> None:
        """Have no actor say another word."""
        for resident in self._residents.values():
            resident.actor.mute()

    async def stop(self) -> None:
        """Mute every actor, then stop them all."""
        self.mute()
        residents = list(self._residents.values())
        self._residents.clear()
        await asyncio.gather(*(resident.actor.stop() for resident in residents))
        await self._tasks.close()

    def over(self, actor: Actor, how: ActorEnd) -> None:
        """An actor has come to an end by itself, and is muted."""
        session = actor.ownership.session
        if not self._is_here(actor):
            return
        if session in self._restoring or how is ActorEnd.FENCED:  # a restore fails then, and may be tried again
            self.drop(session)
        elif how is ActorEnd.OUT_OF_STEP:
            self._anew(actor)
        else:
            self.drop(session)
            self._tasks.spawn(self._end(actor.ownership, actor.alias))

    def _is_here(self, actor: Actor) -> bool:
        """Whether this is its session's actor still; another one may have its place, in a new term for one."""
        resident = self._residents.get(actor.ownership.session)
        return resident is not None and resident.actor is actor

    def _anew(self, actor: Actor) -> None:
        """Restore a session from the tables in the place of its actor, which is muted."""
        session = actor.ownership.session
        if not self._is_here(actor):
            return
        self.drop(session)
        if session not in self._restoring:
            self._restoring.add(session)
            self._tasks.spawn(self._follow(actor))

    async def _follow(self, actor: Actor) -> None:
        """Restore a session when nothing of its former actor is on its way to the tables any more."""
        try:
            await actor.stop()
            await actor.appender.settled()
        finally:
            self._restoring.discard(actor.ownership.session)
        self._again.add(actor.ownership)  # with the next poll: one that is refused at once again is no storm

    async def _end(self, ownership: Ownership, alias: str) -> None:
        await end_session(ownership, alias, self._inbox, self._clock, self._settings.poll, self._tell_ended)
