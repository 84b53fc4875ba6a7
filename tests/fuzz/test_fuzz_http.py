"""Malformed and odd HTTP: never a 500, never a hang, nothing is left."""

from __future__ import annotations

import string
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.conftest import Answer, Target

PATHS = ("/mcp", "/sse", "/messages/", "/livez", "/readyz")
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE")
GOOD = {101, 200, 202, 204, *range(400, 432)}
odd = settings(
    derandomize=True,
    database=None,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
header_text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=60)
names = st.sampled_from([
    "accept", "content-type", "mcp-session-id", "mcp-protocol-version", "last-event-id", "origin", "authorization",
    "content-length", "transfer-encoding", "connection", "upgrade", "expect", "host", "x-forwarded-for", "cookie",
    "content-encoding", "range",
]) | st.text(string.ascii_letters + "-_!#", min_size=1, max_size=20)  # fmt: skip
values = header_text | st.sampled_from([
    "*/*", "text/event-stream", "application/json", "application/json, text/event-stream", "close", "upgrade",
    "keep-alive", "websocket", "chunked", "gzip, chunked", "100-continue", "0", "-1", "5", "99999999999999999999",
    "2025-11-25", "2026-07-28", "bytes=0-", "0" * 32 + ".1", "a" * 9000, ",", ";q=", "x", "\xb2",
])  # fmt: skip
pieces = st.text(string.ascii_letters + "/.%?&=;:@~\\\xe9\u2028\0 ", max_size=30)
paths = (
    st.sampled_from(PATHS)
    | st.builds(lambda base, rest: base + quote(rest, safe="/?&=;:@"), st.sampled_from(PATHS), pieces)
    | st.builds(lambda rest: "/" + quote(rest, safe="/?&=;:@"), pieces)
    | st.sampled_from(["//", "*", "/%", "/%00", "/%ff", "/mcp/%2e%2e/livez", "/" + "a" * 5000, "http://x/mcp",
                       "/messages/?session_id=%00", "/messages/?session_id=%ff", "/messages/?session_id=x&session_id="])
)  # fmt: skip


def check(answer: Answer) -> None:
    assert answer.status is None or answer.status in GOOD, answer.raw[:500]


@odd
@given(raw=st.binary(max_size=300) | st.builds(lambda a, b: a + b"\r\n" + b, st.binary(max_size=80), st.binary()))
@example(raw=b"")
@example(raw=b"\r\n\r\n\r\n")
@example(raw=b"GET\r\n\r\n")
@example(raw=b"GET /livez HTTP/9.9\r\n\r\n")
@example(raw=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
@example(raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
@example(raw=b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n")
@example(raw=b"GET /mcp HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n")
@example(raw=b"GET /mcp HTTP/1.1\r\n" + b"x: yyyyyyyyyyyyyyyyyyyyy\r\n" * 20_000 + b"\r\n")
@example(raw=b"GET /mcp HTTP/1.1\r\nx: " + b"y" * 400_000)
@example(raw=b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 90_000)
@example(raw=b"\r\n" * 200_000)
@example(raw=b"GET /mcp HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n")
@example(raw=b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd")
@example(raw=b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n")
@example(
    raw=b"POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\ncontent-length: 1\r\n\r\n0\r\n\r\n"
)
def test_bytes(watched: Target, raw: bytes) -> None:
    check(watched.send(raw))


@odd
@given(
    method=st.sampled_from(METHODS) | st.text(string.ascii_uppercase, min_size=1, max_size=12),
    path=paths,
    headers=st.lists(st.tuples(names, values), max_size=6),
    body=st.none() | st.binary(max_size=100),
    in_session=st.booleans(),
)
def test_requests(
    watched: Target, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None, in_session: bool
) -> None:
    lines = [f"{name}: {value}".encode("latin-1") + b"\r\n" for name, value in headers]
    if in_session:
        lines.append(b"mcp-session-id: %s\r\n" % str(watched.session.session_id).encode())
    given_host = b"" if any(name == "host" for name, _ in headers) else b"host: 127.0.0.1\r\n"
    framed = any(name in {"content-length", "transfer-encoding"} for name, _ in headers)
    length = b"" if body is None or framed else b"content-length: %d\r\n" % len(body)
    head = f"{method} {path} HTTP/1.1\r\n".encode("latin-1", "replace")
    # our half is closed: whoever waits for more body, or carries a stream, is told that no more comes
    raw = head + given_host + b"".join(lines) + length + b"\r\n" + (body or b"")
    if method != "DELETE":
        check(watched.send(raw))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_every_path(watched: Target, path: str, method: str) -> None:
    answer = watched.exchange(method, path, b"accept: application/json\r\nconnection: close\r\n", b"")
    assert answer.status in GOOD


def test_bodies_that_never_end(watched: Target) -> None:
    """The client goes before it has sent what it promised."""
    start = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    for path in (b"/mcp", b"/messages/?session_id=x", b"/sse", b"/livez"):
        for rest in (
            b"content-length: 50\r\n\r\n{",
            b"transfer-encoding: chunked\r\n\r\n5\r\n{",
            b"expect: 100-contin",
        ):
            answer = watched.send(start % path + rest)
            assert answer.status is None or answer.status in {100, *GOOD}, answer.raw
