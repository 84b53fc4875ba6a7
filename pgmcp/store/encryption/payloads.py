"""Payloads: what clients and servers say, sealed while it lies in the tables (``--encrypt-payloads``).

Invariants:
- What is sealed begins with a byte that no message begins with, and is bound to its row: rows cannot be exchanged. It
  is sealed in pieces of ``PAGE_BYTES``, each bound to its place, so that a large one is read in pieces.
- Every node opens what is sealed, and reads what is not, whether it seals itself or not: what was stored before, and
  what others store, stays readable while a cluster changes.
- A sealed message is as readable to PostgreSQL as a random one. What PostgreSQL has to know of it stands beside it:
  whether a new owner needs the event (one bit), and by which mark a repeated POST is known (a keyed digest).

Failure handling: a key that is not known is looked for once more, then the payload counts as damaged (``PgmcpError``).
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

from pgmcp.errors import PgmcpError
from pgmcp.protocol import CANCELLED, PROGRESS
from pgmcp.store.database import Database
from pgmcp.store.encryption.key_rings import MARKS, OVERHEAD_BYTES, PAYLOADS, KeyRing
from pgmcp.store.encryption.key_wrapping import KeyWrapping
from pgmcp.types import PAGE_BYTES, JournalEntry, Message, RequestKey, SessionKey, StreamId

SEALED = b"\0"
"""The first byte; JSON never begins with it."""

PLAIN, WANTED = b"\x01", b"\x03"
"""The second one: the version, and whether a new owner reads the event; the statement ``inherited_said`` knows them."""

_SAID = tuple(json.dumps(method).encode() for method in (CANCELLED, PROGRESS))

_HEAD = 2
_FIRST, _NEXT = PAGE_BYTES - _HEAD - OVERHEAD_BYTES, PAGE_BYTES - OVERHEAD_BYTES
"""Bytes of a message in its first piece, and in any other."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A client's message as it is stored.

    ``mark`` tells whether it is the same as one that is sealed; ``digest``, only where it is sealed itself, whether it
    is the same as one that is not.
    """

    message: Message
    body: bytes
    mark: bytes | None
    digest: bytes | None


class Payloads:
    """Seals and opens the payloads of one node.

    Args:
        ring: seals and opens.
        marks: its one key, which is never replaced, makes the marks.
        sealing: whether this node seals what it stores.
    """

    def __init__(self, ring: KeyRing, marks: KeyRing, *, sealing: bool) -> None:
        self._ring, self._marks, self.sealing = ring, marks, sealing

    @classmethod
    def of(cls, database: Database, wrapping: KeyWrapping) -> Payloads:
        """Those of a node, as its settings say."""
        ring, marks = KeyRing(database, PAYLOADS, wrapping), KeyRing(database, MARKS, wrapping, rotates=False)
        return cls(ring, marks, sealing=database.settings.encrypt_payloads)

    async def load(self) -> None:
        """Read the keys; where this node seals they are made, and replaced when they are old.

        Raises:
            DatabaseUnavailable: PostgreSQL does not answer; the node keeps what it has.
            SettingsError: the keys are wrapped with a key that this node does not have.
        """
        for ring in (self._ring, self._marks):
            await ring.load(make=self.sealing)

    @property
    def marking(self) -> bool:
        """Whether this node can tell repeats of sealed messages."""
        return self._marks.known

    def stored(self, message: Message) -> Stored:
        """A client's message as it is to be stored."""
        if not self.marking:
            return Stored(message, message.body, None, None)
        digest = sha256(message.body).digest()
        mark = hmac.digest(self._marks.oldest, message.session_id.encode() + b"\0" + digest, "sha256")
        if not self.sealing:
            return Stored(message, message.body, mark, None)
        return Stored(message, self.seal(message.body, place_of_body(message.key)), mark, digest)

    def seal(self, plain: bytes, place: bytes) -> bytes:
        """A payload as it is to be stored."""
        return b"".join([SEALED, PLAIN, *self._pieces(plain, place)]) if self.sealing else plain

    async def seal_event(self, plain: bytes, stream: StreamId, seq: int) -> bytes:
        """An event as it is to be stored; others have their turn while a large one is sealed."""
        if not self.sealing:
            return plain
        stored = [SEALED, WANTED if wanted(plain) else PLAIN]
        for piece in self._pieces(plain, place_of_event(stream, seq)):
            stored.append(piece)
            if len(piece) >= _FIRST:
                await asyncio.sleep(0)
        return b"".join(stored)

    def _pieces(self, plain: bytes, place: bytes) -> Iterator[bytes]:
        for number, start in enumerate([0, *range(_FIRST, len(plain), _NEXT)]):
            end = start + (_NEXT if number else _FIRST)
            yield self._ring.seal(plain[start:end], _piece(place, number, last=end >= len(plain)))

    async def open(self, stored: bytes, place: bytes) -> bytes:
        """A message as it was before it was stored.

        Raises:
            PgmcpError: it cannot be opened, or not here.
        """
        if not stored.startswith(SEALED):
            return stored
        pieces, first = [], memoryview(stored)[_HEAD:]
        bounds = [0, *range(PAGE_BYTES - _HEAD, len(first), PAGE_BYTES), len(first)]
        for number, (start, end) in enumerate(pairwise(bounds)):
            sealed = bytes(first[start:end])
            pieces.append(await self._ring.open(sealed, _piece(place, number, last=end == len(first))))
        return b"".join(pieces)

    async def open_first(self, stored: bytes, size: int, place: bytes) -> tuple[bytes, int]:
        """The first piece of a message, and how many bytes it has besides.

        Args:
            stored: the first ``PAGE_BYTES`` of what is stored.
            size: bytes of what is stored.

        Raises:
            PgmcpError: it cannot be opened.
        """
        if not stored.startswith(SEALED):
            return stored, size - len(stored)
        opened = await self._ring.open(stored[_HEAD:], _piece(place, 0, last=size <= PAGE_BYTES))
        pieces = -(-size // PAGE_BYTES)
        return opened, size - _HEAD - pieces * OVERHEAD_BYTES - len(opened)

    async def open_piece(self, stored: bytes, place: bytes, start: int, *, last: bool) -> bytes:
        """A piece of a sealed message that begins at ``start``.

        Raises:
            PgmcpError: it cannot be opened.
        """
        return await self._ring.open(stored, _piece(place, _number(start), last=last))


def stored_from(start: int) -> int:
    """Where the piece of a sealed message lies that begins at ``start`` of the message."""
    return _number(start) * PAGE_BYTES


def is_sealed(stored: bytes) -> bool:
    """Whether a payload is sealed."""
    return stored.startswith(SEALED)


def wanted(message: bytes) -> bool:
    """Whether a new owner reads an event: questions, cancels, progress."""
    asks = b'"id":' in message and b'"method":' in message
    return asks or any(method in message for method in _SAID)


def place_of_body(key: RequestKey) -> bytes:
    """Where a client's message lies."""
    return b"requests.body/" + key.bytes


def place_of_event(stream: StreamId, seq: int) -> bytes:
    """Where an event lies."""
    return b"events.message/%b/%d" % (stream.bytes, seq)


def place_of_entry(session: SessionKey, entry: JournalEntry) -> bytes:
    """Where an entry of a journal lies."""
    return f"journal.body/{session}/{entry.kind}/{entry.detail}".encode()


def _number(start: int) -> int:
    return 0 if start < _FIRST else 1 + (start - _FIRST) // _NEXT


def _piece(place: bytes, number: int, *, last: bool) -> bytes:
    return b"%b/%d/%d" % (place, number, last)


class _Clear(Payloads):
    """Where nothing is sealed and no keys are known."""

    def __init__(self) -> None:
        self.sealing = False

    @property
    def marking(self) -> bool:
        return False

    async def load(self) -> None:
        return None

    async def open(self, stored: bytes, place: bytes) -> bytes:
        if is_sealed(stored):
            message = "A payload is sealed, and this has no keys."
            raise PgmcpError(message)
        return stored

    async def open_first(self, stored: bytes, size: int, place: bytes) -> tuple[bytes, int]:
        return await self.open(stored, place), size - len(stored)


CLEAR: Payloads = _Clear()
