r"""Text in databases whose encoding does not hold all of Unicode.

Names, methods, uris and ids come from clients in any script, and a statement fails with a text that the server cannot
convert. So what it cannot hold is stored as an escape, ``\u{416}``: reversible, readable in the views, equal where the
texts are equal. A literal ``\u{`` is stored as ``\u{5c}u{``. In a UTF-8 or SQL_ASCII database (which stores the bytes
that it gets) nothing is changed; messages are bytes everywhere.
"""

from __future__ import annotations

import re

import asyncpg

CODECS = {
    "LATIN1": "latin-1", "LATIN2": "iso8859-2", "LATIN3": "iso8859-3", "LATIN4": "iso8859-4", "LATIN5": "iso8859-9",
    "LATIN6": "iso8859-10", "LATIN7": "iso8859-13", "LATIN8": "iso8859-14", "LATIN9": "iso8859-15",
    "LATIN10": "iso8859-16", "ISO_8859_5": "iso8859-5", "ISO_8859_6": "iso8859-6", "ISO_8859_7": "iso8859-7",
    "ISO_8859_8": "iso8859-8", "WIN1250": "cp1250", "WIN1251": "cp1251", "WIN1252": "cp1252", "WIN1253": "cp1253",
    "WIN1254": "cp1254", "WIN1255": "cp1255", "WIN1256": "cp1256", "WIN1257": "cp1257", "WIN1258": "cp1258",
    "WIN866": "cp866", "WIN874": "cp874", "KOI8R": "koi8-r", "KOI8U": "koi8-u",
}  # fmt: skip
"""What an encoding holds besides ASCII, in Python's names; of any other one only ASCII is used."""

WHOLE = frozenset({"UTF8", "SQL_ASCII"})

_LITERAL = re.compile(r"\\(?=u\{)")
_ESCAPE = re.compile(r"\\u\{([0-9a-f]{1,6})\}")


class Encoding:
    """How texts are written to a server and read from it.

    Args:
        name: the server's encoding, in PostgreSQL's words.
    """

    def __init__(self, name: str) -> None:
        self.whole = name in WHOLE
        self._codec = CODECS.get(name, "ascii")

    def given(self, value: object) -> object:
        """A statement's argument as the server can take it: a text, or an array that may hold some."""
        if isinstance(value, str):
            return self._escaped(value)
        if isinstance(value, (list, tuple)):
            return [self.given(each) for each in value]
        return value

    def _escaped(self, text: str) -> str:
        text = _LITERAL.sub(r"\\u{5c}", text)
        if text.isascii():
            return text
        return "".join(each if self._holds(each) else f"\\u{{{ord(each):x}}}" for each in text)

    def _holds(self, character: str) -> bool:
        try:
            character.encode(self._codec)
        except UnicodeEncodeError:
            return False
        return True


def encoding_of(connection: asyncpg.Connection) -> Encoding:
    """How to write to the server of a connection, which has said its encoding in its greeting."""
    return Encoding(str(connection.get_settings().server_encoding))


def unescaped(text: str) -> str:
    """A text as it was before it was stored."""
    return _ESCAPE.sub(_character, text) if "\\u{" in text else text


def _character(found: re.Match[str]) -> str:
    code = int(found[1], 16)
    return chr(code) if 0 < code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF else found[0]


async def read_unescaped(connection: asyncpg.Connection) -> None:
    """Read texts on this connection as they were before they were stored.

    Raises:
        Exception: whatever asyncpg raises.
    """
    if not encoding_of(connection).whole:
        await connection.set_type_codec("text", schema="pg_catalog", encoder=str, decoder=unescaped, format="text")
