"""The database's address: one server, or several of which one is the primary; taken apart in this place only.

As libpq has it: ``postgresql://user@a:5432,b:5433/db``, or ``postgresql://user@/db?host=a,b&port=5432,5433``. With
several servers and no ``target_session_attrs`` the one is wanted that takes writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from pgmcp.settings import IN_FILE

WANTED = "target_session_attrs"
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]@]*)(:\d*)?")
_IN_QUERY = re.compile(r"\?(?:[^@]*&)?\w+=[^@&]*@")
"""An @ in a value of the query; any other one belongs to the login, whatever was left unescaped there."""


class AddressUnread(OSError):
    """The address lies in a file that cannot be read now; those who wait for the database try again."""


class AddressMalformed(AddressUnread):
    """It can be read, and is none: the file may be written anew. The driver's text is not told, it may quote it."""

    def __init__(self) -> None:
        super().__init__("the database's address is malformed")


@dataclass(frozen=True, slots=True)
class _Parts:
    scheme: str
    login: str
    hosts: str
    path: str
    query: str


def _parts(url: str) -> _Parts:
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "", url
    end = next((place for place, char in enumerate(rest) if char in "/?#"), len(rest))
    login, at, hosts = rest[:end].rpartition("@")
    path, _, query = rest[end:].partition("?")
    return _Parts(scheme + mark, login + at, hosts, path, query)


def current(url: str) -> str:
    """The address itself, read from its file if it lies in one: it may have changed, as passwords do.

    Raises:
        AddressUnread: the file cannot be read, or nothing is in it.
    """
    if not url.startswith(IN_FILE):
        return url
    path = url.removeprefix(IN_FILE)
    try:
        text = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        message = f"the file {path} with the database's address cannot be read: {reason}"
        raise AddressUnread(message) from None
    if not text:
        message = f"the file {path} is empty; write the database's address into it"
        raise AddressUnread(message)
    return text


def servers(url: str) -> list[str]:
    """The address of each server that the URL names, in its order; the URL itself when that is one.

    What is malformed is left as it is, for the driver to complain about.

    Raises:
        AddressUnread: it lies in a file that cannot be read.
    """
    url = current(url).replace("postgresql+asyncpg://", "postgresql://", 1)
    parts = _parts(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    named = dict(query)
    hosts = parts.hosts or named.get("host", "")
    if "," not in hosts:
        return [url]
    ports = named.get("port", "").split(",")
    each = hosts.split(",")
    if len(ports) == 1:
        ports *= len(each)
    if len(ports) != len(each) or not all(each):
        return [url]
    rest = [pair for pair in query if pair[0] not in {"host", "port"}]
    if WANTED not in named:
        rest.append((WANTED, "read-write"))
    return [_one(parts, host, port, rest) for host, port in zip(each, ports, strict=True)]


def _one(parts: _Parts, host: str, port: str, query: list[tuple[str, str]]) -> str:
    if host.startswith("/"):  # a unix socket's folder is no host of a URL
        query = [*query, ("host", host), ("port", port or "5432")]
        return f"{parts.scheme}{parts.login}{parts.path}?{urlencode(query)}"
    given = _HOST.fullmatch(host)
    if port and given is not None and not given[2]:
        host = f"{host}:{port}"
    return f"{parts.scheme}{parts.login}{host}{parts.path}?{urlencode(query)}"


def place(url: str) -> str:
    """Where the URL points, without user and password; for messages."""
    try:
        url = current(url)
    except AddressUnread:
        return f"PostgreSQL at the address in {url.removeprefix(IN_FILE)}"
    parts = _parts(url)
    if not parts.scheme:  # perhaps a libpq string, "host=… password=…"
        return "PostgreSQL at the given address"
    hosts, path = parts.hosts or dict(parse_qsl(parts.query)).get("host", ""), parts.path
    if "@" in url[len(parts.scheme + parts.login) :] and _IN_QUERY.search(url) is None:
        # The password has an unescaped slash or question mark: it must not show either.
        last = _parts(url.rpartition("@")[2])
        hosts, path = last.hosts, last.path
    if not all(_HOST.fullmatch(host) for host in hosts.split(",")):
        return "PostgreSQL at the given address"
    return f"PostgreSQL at {(hosts + path).strip('/') or 'the default place'}"
