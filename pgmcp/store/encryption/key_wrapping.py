"""Key wrapping: keys that lie in the database are encrypted with a key that does not.

Invariant: what is wrapped says with which key (a fingerprint of it), and is bound to its purpose.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pgmcp.errors import SettingsError
from pgmcp.settings import Settings

SHORTEST_CHARACTERS = 32
_NONCE, _PRINT = 12, 4
_INFO = b"pgmcp/secrets-key/v1"


@dataclass(frozen=True, slots=True)
class Stored:
    """A key as it lies in its row; ``wrapped_by`` is None for one that lies in clear."""

    key: bytes
    wrapped_by: bytes | None


class KeyWrapping:
    """Wraps with the first key that it was given, unwraps with any, and wraps nothing without one.

    Args:
        secrets: texts of 32 characters or more.

    Raises:
        SettingsError: one is shorter.
    """

    def __init__(self, secrets: list[str]) -> None:
        if any(len(secret) < SHORTEST_CHARACTERS for secret in secrets):
            message = (
                f"A secrets key (--secrets-key, --secrets-key-file) has {SHORTEST_CHARACTERS} characters or more; "
                "make one with: "
                'python -c "import secrets; print(secrets.token_hex(32))"'
            )
            raise SettingsError(message)
        derived = [HKDF(SHA256(), 32, None, _INFO).derive(secret.encode()) for secret in secrets]
        self._keys = {hashlib.sha256(_INFO + key).digest()[:_PRINT]: AESGCM(key) for key in derived}
        self._first = next(iter(self._keys), None)

    @property
    def wraps(self) -> bool:
        """Whether it was given a key."""
        return self._first is not None

    def wrap(self, key: bytes, purpose: str) -> Stored:
        """A key as it is to be stored."""
        if self._first is None:
            return Stored(key, None)
        nonce = os.urandom(_NONCE)
        return Stored(nonce + self._keys[self._first].encrypt(nonce, key, purpose.encode()), self._first)

    def unwrap(self, stored: Stored, purpose: str) -> bytes:
        """The key that was stored.

        Raises:
            SettingsError: it was wrapped with a key that this node does not have.
        """
        if stored.wrapped_by is None:
            return stored.key
        wrapping = self._keys.get(stored.wrapped_by)
        try:
            if wrapping is None:
                raise InvalidTag
            return wrapping.decrypt(stored.key[:_NONCE], stored.key[_NONCE:], purpose.encode())
        except InvalidTag:
            mine = ", ".join(each.hex() for each in self._keys) or "none"
            message = (
                f"The cluster's keys are wrapped with the secrets key {stored.wrapped_by.hex()}, and this node has "
                f"{mine}: give it the --secrets-key (or --secrets-key-file) that the other nodes have."
            )
            raise SettingsError(message) from None

    def outdated(self, stored: Stored) -> bool:
        """Whether a key lies otherwise than ``wrap`` would store it, and should be stored anew."""
        return self._first is not None and stored.wrapped_by != self._first


def wrapping_of(settings: Settings) -> KeyWrapping:
    """What the settings say.

    Raises:
        SettingsError: the file cannot be read or is empty, or a key is too short.
    """
    if not settings.secrets_key_file:
        return KeyWrapping([part.strip() for part in settings.secrets_key.split(",") if part.strip()])
    try:
        lines = Path(settings.secrets_key_file).read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        message = f"The file of --secrets-key-file, {settings.secrets_key_file}, cannot be read: {error}."
        raise SettingsError(message) from error
    if not lines:
        message = f"The file of --secrets-key-file, {settings.secrets_key_file}, is empty; write a key into it."
        raise SettingsError(message)
    return KeyWrapping(lines)
