"""Key rings: what nodes share so that one can open what another sealed.

A ring is a row for each key of a purpose. The first node makes the first key, and whoever comes to it first makes the
next one when the newest is old enough (``key_rotation``). Every node reads the ring anew every ``REFRESH_SECONDS``.

Invariants:
- What is sealed names its key, is bound to its place, and is never logged (G8).
- Every key of the ring opens. The newest that is ``RIPE_SECONDS`` old seals: by then every node has read it (all in
  database time). The only key of a ring seals at once.
- A key that was replaced is kept for longer than anything lives that it has sealed.
- Where nodes have a secrets key, what lies in clear is taken up once, all of a ring in one statement. From then on a
  key in clear is refused: it was planted.

Failure handling: a node that cannot read the ring goes on with what it has. An unknown key is looked up once more
before it is refused; for what clients send, once in ``SETTLED_SECONDS``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

import asyncpg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pgmcp.clock import Ids
from pgmcp.errors import DatabaseUnavailable, PgmcpError, SettingsError
from pgmcp.store.database import Database
from pgmcp.store.encryption.key_wrapping import KeyWrapping, Stored

logger = logging.getLogger(__name__)

CONTEXTS, STATES, PAYLOADS, MARKS = "context", "request-state", "payload", "payload-mark"

REFRESH_SECONDS = 60.0
"""Seconds after which a node reads its rings anew, at most."""

RIPE_SECONDS = 3 * REFRESH_SECONDS
"""Seconds after which a key may seal: every node had two chances to read it, and asks when it meets it unread."""

KEPT_SECONDS = 86400.0
"""Seconds for which a key is kept beyond the life of any session."""

NEVER_SECONDS = 1e9
"""Seconds after which a key is replaced that is not to be."""

SETTLED_SECONDS = 1.0
"""Seconds for which a key that was not there is not looked for again."""

_KEY_ID, _NONCE, _TAG = 4, 12, 16
OVERHEAD_BYTES = _KEY_ID + _NONCE + _TAG
"""Bytes that sealing adds."""


@dataclass(frozen=True, slots=True)
class _Key:
    raw: bytes
    cipher: AESGCM
    seals_from: float


class KeyRing:
    """The ``SecretBox`` port with AES-256-GCM and keys from the ``secrets`` table.

    Args:
        purpose: which of the rings.
        wrapping: how the keys lie in the table.
        rotates: whether keys are replaced.
    """

    def __init__(self, database: Database, purpose: str, wrapping: KeyWrapping, *, rotates: bool = True) -> None:
        self._database, self._purpose, self._wrapping = database, purpose, wrapping
        self._rotation = database.settings.key_rotation if rotates else NEVER_SECONDS
        self._keys: dict[int, _Key] = {}
        self._looking = asyncio.Lock()
        self._looked, self._found = float("-inf"), True
        self._wrapped, self._refused = False, set[int]()

    @property
    def known(self) -> bool:
        """Whether there are keys."""
        return bool(self._keys)

    @property
    def key_ids(self) -> frozenset[int]:
        """The keys that it has read; what is sealed names one of them."""
        return frozenset(self._keys)

    @property
    def oldest(self) -> bytes:
        """The first key of a ring that has some."""
        return self._keys[min(self._keys)].raw

    async def load(self, *, make: bool = True) -> None:
        """Read the ring, after making its next key if it is time for one.

        Args:
            make: False only reads what others have made.

        Raises:
            DatabaseUnavailable: PostgreSQL does not answer; the node keeps what it has.
            SettingsError: the keys are wrapped with a key that this node does not have.
        """
        settings, clock = self._database.settings, self._database.clock
        if make:
            made = self._wrapping.wrap(AESGCM.generate_key(256), self._purpose)
            await self._persist("add_key", self._purpose, made.key, made.wrapped_by, self._rotation)
        await self._persist("drop_keys", self._purpose, RIPE_SECONDS + settings.max_age + KEPT_SECONDS)
        rows = await self._persist("key_ring", self._purpose)
        now, ring = clock.boottime(), self._ours({row["id"]: Stored(row["key"], row["wrapped_by"]) for row in rows})
        opened = {key_id: self._wrapping.unwrap(stored, self._purpose) for key_id, stored in ring.items()}
        await self._wrap({key_id: stored for key_id, stored in ring.items() if self._wrapping.outdated(stored)}, opened)
        ages = {row["id"]: row["age"] for row in rows}
        self._keys = {
            key_id: _Key(key, AESGCM(key), now + RIPE_SECONDS - ages[key_id]) for key_id, key in opened.items()
        }

    def _ours(self, ring: dict[int, Stored]) -> dict[int, Stored]:
        """The keys that may be used: where keys were ever wrapped, one that lies in clear was planted."""
        if not self._wrapping.wraps:
            return ring
        self._wrapped |= any(stored.wrapped_by is not None for stored in ring.values())
        clear = [key_id for key_id, stored in ring.items() if stored.wrapped_by is None] if self._wrapped else []
        for key_id in set(clear) - self._refused:
            logger.error(
                "key %d of ring %s lies in clear, though the ring's keys are wrapped: it is not used. Whoever may "
                "write table secrets, or a node without the --secrets-key, has put it there; look who, and delete it",
                key_id,
                self._purpose,
            )
        self._refused.update(clear)
        ours = {key_id: stored for key_id, stored in ring.items() if key_id not in clear}
        if ring and not ours:
            message = f"Every key of ring {self._purpose} lies in clear, and they were wrapped: restore table secrets."
            raise SettingsError(message)
        return ours

    async def _wrap(self, outdated: dict[int, Stored], opened: dict[int, bytes]) -> None:
        if not outdated:
            return
        anew = [self._wrapping.wrap(opened[key_id], self._purpose) for key_id in outdated]
        before = [stored.key for stored in outdated.values()]
        await self._persist("wrap_keys", list(outdated), before, [each.key for each in anew], anew[0].wrapped_by)
        self._wrapped = True

    def seal(self, plain: bytes, place: bytes) -> bytes:
        """See ``SecretBox.seal``."""
        now, nonce = self._database.clock.boottime(), os.urandom(_NONCE)
        ripe = (key_id for key_id, key in self._keys.items() if key.seals_from <= now)
        newest = max(ripe, default=min(self._keys))
        return newest.to_bytes(_KEY_ID, "big") + nonce + self._keys[newest].cipher.encrypt(nonce, plain, place)

    async def open(self, sealed: bytes, place: bytes) -> bytes:
        """See ``SecretBox.open``."""
        if _key_id(sealed) not in self._keys:
            await self.load(make=False)
        return self.open_known(sealed, place)

    def open_known(self, sealed: bytes, place: bytes) -> bytes:
        """See ``StateBox.open_known``."""
        key, rest = self._keys.get(_key_id(sealed)), sealed[_KEY_ID:]
        try:
            if key is None:
                raise InvalidTag
            return key.cipher.decrypt(rest[:_NONCE], rest[_NONCE:], place)
        except (InvalidTag, ValueError):
            message = f"A sealed value cannot be opened with key {_key_id(sealed)} of this cluster's ring."
            raise PgmcpError(message) from None

    async def learn(self, sealed: bytes) -> None:
        """See ``StateBox.learn``."""
        clock = self._database.clock
        if _key_id(sealed) in self._keys:
            return
        async with self._looking:
            if _key_id(sealed) in self._keys:
                return
            if clock.boottime() - self._looked >= SETTLED_SECONDS:
                try:
                    self._found = False
                    await self.load()
                    self._found = True
                finally:
                    self._looked = clock.boottime()
            if not self._found:
                message = "The cluster's keys cannot be read now; try again."
                raise DatabaseUnavailable(message)

    async def _persist(self, name: str, *args: object) -> list[asyncpg.Record]:
        return await self._database.persist(name, *args, patience=self._database.settings.statement_timeout)


class StateRing(KeyRing):
    """The ``StateBox`` port: the ring for ``requestState``, and which of them were used.

    Args:
        wrapping: how the keys lie in the table.
    """

    def __init__(self, database: Database, wrapping: KeyWrapping, ids: Ids) -> None:
        super().__init__(database, STATES, wrapping)
        self._ids = ids

    async def spend(self, sealed: bytes, seconds: float) -> bool:
        """See ``StateBox.spend``."""
        state = sealed[: _KEY_ID + _NONCE]
        patience = self._database.settings.hold
        rows = await self._database.persist("spend_state", state, self._ids.uuid(), seconds, patience=patience)
        return any(row["mine"] for row in rows)


def _key_id(sealed: bytes) -> int:
    return int.from_bytes(sealed[:_KEY_ID], "big")
