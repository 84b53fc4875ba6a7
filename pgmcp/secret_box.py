"""What seals what leaves a node: ports of the store, as in ``ports``."""

from __future__ import annotations

from typing import Protocol


class SecretBox(Protocol):
    """Seals what must not lie in the database in clear, with a key that every node has."""

    def seal(self, plain: bytes, place: bytes) -> bytes:
        """Encrypt; ``place`` says where the box will lie, and it opens nowhere else."""
        ...

    async def open(self, sealed: bytes, place: bytes) -> bytes:
        """Decrypt.

        Raises:
            PgmcpError: another key, another place, or damaged.
        """
        ...


class StateBox(Protocol):
    """Seals what clients keep for a while and bring to any node: ``requestState`` (2026-07-28)."""

    def seal(self, plain: bytes, place: bytes) -> bytes:
        """See ``SecretBox.seal``."""
        ...

    def open_known(self, sealed: bytes, place: bytes) -> bytes:
        """Decrypt with the keys that are known now.

        Raises:
            PgmcpError: another key, another place, or damaged.
        """
        ...

    async def learn(self, sealed: bytes) -> None:
        """Look for the key of a box that is not known; once in a while only, since anybody may send anything.

        Raises:
            DatabaseUnavailable: that cannot be said now.
        """
        ...

    async def spend(self, sealed: bytes, seconds: float) -> bool:
        """Use a box; whether this is the first time, on any node.

        Args:
            seconds: for how long that is remembered.

        Raises:
            DatabaseUnavailable: that cannot be said now.
        """
        ...
