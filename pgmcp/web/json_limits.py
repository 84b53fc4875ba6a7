"""What a body may contain, found out before any parser builds it.

A parser makes an object of each container, key and element: four megabytes can be two million of them, and hold the
event loop for seconds. Their marks (brackets, colons, commas) and the digits of numbers are counted at the speed of
``bytes``; what lies in strings costs nothing, so a large text passes.

Invariants:
- What is counted is never less than what a parser meets before it stops: quotes and backslashes mean the same to both,
  up to the first byte that is no JSON.
- Large bodies are counted piece by piece, and the event loop goes on in between.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import accumulate

from pgmcp.protocol import PARSE_ERROR
from pgmcp.settings import Settings
from pgmcp.web.json_rpc import Refusal

DIGITS = 20
"""Those of one number, on average, if all that a body may contain are numbers."""

PIECE_BYTES = 128 * 1024
"""Bytes that are looked at without a pause."""

_DIGITS = b"0123456789"
_OPEN, _CLOSE = b"{[", b"}]"
_NEITHER = bytes(set(range(256)) - set(_DIGITS + _OPEN + _CLOSE + b":,"))
_STEPS = bytes(1 if byte in _OPEN else 255 if byte in _CLOSE else 0 for byte in range(256))


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """What a body may contain.

    ``elements`` are its brackets, colons and commas outside of strings, ``depth`` its levels of nesting.
    """

    elements: int
    depth: int

    def check(self, body: bytes) -> None:
        """Look at a small body.

        Raises:
            Refusal: 400, it contains too much, or is no UTF-8.
        """
        _check_encoding(body)
        seen = _Seen(self)
        seen.add(body)
        if seen.suspicious:
            Count(self).add(body)

    async def check_large(self, body: bytes) -> None:
        """Look at any body, without holding up others.

        Raises:
            Refusal: as ``check``.
        """
        _check_encoding(body)
        seen = _Seen(self)
        for start in range(0, len(body), PIECE_BYTES):
            seen.add(body[start : start + PIECE_BYTES])
            await asyncio.sleep(0)
        if seen.suspicious:
            count = Count(self)
            for start in range(0, len(body), PIECE_BYTES):
                count.add(body[start : start + PIECE_BYTES])
                await asyncio.sleep(0)


def json_limits_of(settings: Settings) -> JsonLimits:
    """What the operator lets pass."""
    return JsonLimits(settings.max_elements, settings.max_depth)


def _check_encoding(body: bytes) -> None:
    """JSON is UTF-8 (RFC 8259 section 8.1); a parser that guesses others reads quotes where there are none."""
    if b"\0" in body[:4] or body[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        raise Refusal(400, "Parse error: the body is not UTF-8", PARSE_ERROR)


class _Seen:
    """What a body has, in strings or outside of them."""

    def __init__(self, limits: JsonLimits) -> None:
        self._limits = limits
        self._openings = self._marks = self._digits = 0

    def add(self, piece: bytes) -> None:
        """Go on with the next piece."""
        left = piece.translate(None, _NEITHER)
        marks = len(left.translate(None, _DIGITS))
        self._marks += marks
        self._digits += len(left) - marks
        self._openings += left.count(b"{") + left.count(b"[")

    @property
    def suspicious(self) -> bool:
        """Whether it would be too much if nothing of it were in strings."""
        most, depth = self._limits.elements, self._limits.depth
        return self._openings > depth or self._marks > most or self._digits > most * DIGITS


class Count:
    """Counts what one body has outside of strings, and its levels."""

    def __init__(self, limits: JsonLimits) -> None:
        self._limits = limits
        self.marks = self._digits = self._quotes = self.level = 0
        self._escape = b""  # a backslash at the end of a piece belongs to what comes next

    def add(self, piece: bytes) -> None:
        """Go on with the next piece.

        Raises:
            Refusal: as ``JsonLimits.check``.
        """
        left = self._outside(piece).translate(None, _NEITHER)
        marks = left.translate(None, _DIGITS)
        self.marks += len(marks)
        self._digits += len(left) - len(marks)
        most, deepest = self._limits.elements, self._limits.depth
        if self.marks > most or self._digits > most * DIGITS or self._quotes > 2 * most + 2:
            text = f"Parse error: more than {most} brackets, colons and commas outside of strings, or as many strings, "
            text += f"or {most * DIGITS} digits; send large data as one string, or in several messages"
            raise Refusal(400, text, PARSE_ERROR)
        levels = list(accumulate(memoryview(marks.translate(_STEPS)).cast("b"), initial=self.level))
        self.level = levels[-1]
        if max(levels) > deepest:
            raise Refusal(400, f"Parse error: more than {deepest} levels of nesting", PARSE_ERROR)

    def _outside(self, piece: bytes) -> bytes:
        """The bytes that lie in no string."""
        inside, text = self._quotes % 2, self._escape + piece
        self._escape = b""
        if b"\\" in text:
            bare = text.rstrip(b"\\")
            self._escape = b"\\" * ((len(text) - len(bare)) % 2)
            text = bare.replace(b"\\\\", b"").replace(b'\\"', b"")
        self._quotes += text.count(b'"')
        return b"".join(text.split(b'"')[inside::2])
