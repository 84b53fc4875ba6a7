"""The key ring: what nodes share so that one can open what another sealed.

Invariants:
- What is sealed names its key, is bound to its place, and is never logged (G8).
- The newest key seals, every key of the ring opens; an unknown key is looked up once more before it is refused.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pgmcp.errors import PgmcpError
from pgmcp.store.database import Database

PURPOSE = "context"
_KEY_ID, _NONCE = 4, 12


class KeyRing:
    """The ``SecretBox`` port with AES-256-GCM and keys from the ``secrets`` table."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys: dict[int, AESGCM] = {}

    async def load(self) -> None:
        """Read the ring; the first node of a cluster makes its first key.

        Raises:
            DatabaseUnavailable: PostgreSQL does not answer.
        """
        patience = self._database.settings.statement_timeout
        await self._database.persist("add_key", PURPOSE, AESGCM.generate_key(256), patience=patience)
        rows = await self._database.persist("key_ring", PURPOSE, patience=patience)
        self._keys = {row["id"]: AESGCM(row["key"]) for row in rows}

    def seal(self, plain: bytes, place: bytes) -> bytes:
        """See ``SecretBox.seal``."""
        newest, nonce = max(self._keys), os.urandom(_NONCE)
        return newest.to_bytes(_KEY_ID, "big") + nonce + self._keys[newest].encrypt(nonce, plain, place)

    async def open(self, sealed: bytes, place: bytes) -> bytes:
        """See ``SecretBox.open``."""
        key_id = int.from_bytes(sealed[:_KEY_ID], "big")
        if key_id not in self._keys:
            await self.load()
        key, rest = self._keys.get(key_id), sealed[_KEY_ID:]
        try:
            if key is None:
                raise InvalidTag
            return key.decrypt(rest[:_NONCE], rest[_NONCE:], place)
        except (InvalidTag, ValueError):
            message = f"A sealed value cannot be opened with key {key_id} of this cluster's ring."
            raise PgmcpError(message) from None
