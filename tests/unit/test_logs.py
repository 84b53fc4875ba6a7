"""Log lines: one for each event, whatever is in it, and nothing of clients where libraries or pgmcp speak."""

from __future__ import annotations

import hashlib
import io
import json
import linecache
import logging
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import mcp.server.transport_security as library
import pydantic
import pytest

from pgmcp.errors import PgmcpError, told
from pgmcp.ops import logs, redaction
from pgmcp.ops.redaction import said, show_warning
from pgmcp.store.connection.error_text import error_text
from pgmcp.types import session_alias

MARK = "m4rk3r"
EVIL = f"a\n2026-01-01 ERROR root: {MARK}\r\x1b[2J\x85\u2028\u2029\u202e\x00\udc80\x7f"
LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


class Stream(io.StringIO):
    def lines(self) -> list[str]:
        """What was written; ``splitlines`` knows more line ends than a terminal."""
        text = self.getvalue()
        assert not any(char in text.replace("\n", "") for char in LINE_ENDS + "\x1b\x00\u202e")
        return text.splitlines()


class Alone(list[logging.Handler]):
    """Handlers that nobody adds to: what pytest records goes into its report, which cannot hold every character."""

    def append(self, handler: logging.Handler) -> None:
        """Leave it out."""


@pytest.fixture(params=["text", "json"])
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    """What a node would write."""
    written = Stream()
    handler = logs.handler(request.param, written)
    root = logging.getLogger()
    before, root.handlers = root.handlers, Alone([handler])
    yield written
    root.handlers = before


def of_library(source: str) -> Callable[..., None]:
    """A function ``speak`` that looks as if it were part of a library."""
    at = Path(library.__file__).parent / f"invented{abs(hash(source))}.py"
    module = types.ModuleType("mcp.server.invented")
    linecache.cache[str(at)] = (len(source), None, source.splitlines(keepends=True), str(at))
    exec(compile(source, at, "exec"), module.__dict__)
    return module.speak  # type: ignore[no-any-return]


def test_an_event_is_a_line_and_its_text_stays_readable(stream: Stream) -> None:
    operator = logging.getLogger(f"shop.{EVIL}")
    operator.warning("sold %s", EVIL)
    try:
        raise ValueError(EVIL)
    except ValueError:
        operator.exception("not sold", stack_info=True)
    lines = stream.lines()
    assert len(lines) == 2
    assert all(MARK in line for line in lines), "what the served server says is its operator's"
    assert "ValueError" in lines[1]
    if lines[0].startswith("{"):
        told = [json.loads(line) for line in lines]
        assert told[0]["message"] == f"sold {EVIL}"
        assert "test_an_event_is_a_line" in told[1]["traceback"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ('logger.warning(f"bad {value} of {value!r:>3}")', "bad {value} of {value}"),
        ('logger.warning("bad %s", value)', "bad %s"),
        ('logger.log(30, "bad %s" " and more", value)', "bad %s and more"),
        ('logger.error(\n        "bad %s",\n        value,\n    )', "bad %s"),
        ('logger.error("bad %s" % value)', "bad %s"),
        ("logger.error(value)", "speak (invented"),
        ("logger.error('bad ' + value)", "bad "),
        ("[logger.error(value) for _ in '1']", "(invented"),
    ],
)
def test_of_a_library_only_its_source_is_said(stream: Stream, call: str, text: str) -> None:
    speak = of_library(f"import logging\nlogger = logging.getLogger('mcp.invented')\ndef speak(value):\n    {call}\n")
    speak(EVIL)
    [line] = stream.lines()
    assert text in line
    assert MARK not in line


def test_errors_of_libraries_and_of_pgmcp_have_no_text(stream: Stream) -> None:
    speak = of_library(
        "import logging\nlogger = logging.getLogger('mcp.invented')\n"
        "def speak(error):\n    logger.error('it failed', exc_info=error)\n"
    )

    class Form(pydantic.BaseModel):
        age: int

    def fail() -> None:
        try:
            Form(age=MARK)  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            error.add_note(MARK)
            inner = KeyError(MARK)
            raise ExceptionGroup(MARK, [inner, RuntimeError(MARK)]) from error

    try:
        fail()
    except ExceptionGroup as failed:
        speak(failed)
    [line] = stream.lines()
    assert MARK not in line
    for expected in (
        "ValidationError",
        "KeyError",
        "RuntimeError",
        "ExceptionGroup",
        "in fail",
        "raise ExceptionGroup(",
    ):
        assert expected in line
    logs._nobody_caught(ValueError(MARK))
    assert MARK not in stream.lines()[1]
    assert told(ValueError(MARK)) == "ValueError"
    assert told(PgmcpError("ours")) == "ours"


def test_an_error_that_causes_itself_ends(stream: Stream) -> None:
    first, second = ValueError(), ValueError()
    first.__context__, second.__context__ = second, first
    record = logging.LogRecord("pgmcp", 40, redaction.__file__, 1, "it", (), (ValueError, first, None))
    assert redaction.trace(record)


def test_compiled_libraries_are_known_by_their_loggers(stream: Stream) -> None:
    """What uvloop says comes from no Python file of its own."""
    logging.getLogger("asyncio").error(f"Future finished result={MARK}")
    [line] = stream.lines()
    assert MARK not in line


def test_loggers_that_a_server_got_from_fastmcp_are_its_own(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fastmcp"), "propagate", True)  # FastMCP, once imported, says otherwise
    logging.getLogger("fastmcp.mine").error(MARK)
    assert MARK in stream.lines()[0]


@pytest.mark.parametrize("wrong", ["%d", "%s %s"])
def test_a_record_that_cannot_be_written_shows_nothing(
    stream: Stream, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = logging.LogRecord("shop", logging.ERROR, __file__, 1, wrong, (MARK,), None)
    logging.getLogger().handlers[0].handle(record)
    [line] = stream.lines()
    assert "could not be written" in line
    assert MARK not in line + capsys.readouterr().err


def test_only_pgmcp_has_fields(stream: Stream) -> None:
    logging.getLogger("shop").error("sold", extra={"fields": [object()]})
    [line] = stream.lines()
    assert "sold" in line


def test_warnings_of_libraries_have_no_text(stream: Stream) -> None:
    show_warning(MARK, UserWarning, pydantic.__file__, 7)
    show_warning(f"{MARK}\n", DeprecationWarning, __file__, 8)
    first, second = stream.lines()
    assert MARK not in first
    assert "UserWarning" in first
    assert f"{Path(pydantic.__file__)}:7" in first
    assert MARK in second


def test_every_handler_of_a_library_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastMCP brings handlers that print whole messages and tracebacks, and does not propagate."""
    root, theirs = logging.getLogger(), logging.getLogger("fastmcp")
    before = root.handlers[:], root.level, theirs.handlers[:], theirs.propagate
    monkeypatch.setenv("FASTMCP_LOG_ENABLED", "true")
    for module, name in ((warnings, "showwarning"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    try:
        theirs.addHandler(logging.NullHandler())
        theirs.propagate = False
        theirs.setLevel(logging.INFO)
        logs.configure("text", level="debug")
        assert theirs.propagate
        assert not theirs.handlers
        assert theirs.isEnabledFor(logging.DEBUG), "its own level goes, too"
        assert os.environ["FASTMCP_LOG_ENABLED"] == "false", "when it is imported later it brings none"
    finally:
        root.handlers, root.level, theirs.handlers, theirs.propagate = before


def test_templates_are_found_in_what_is_installed() -> None:
    source = Path(library.__file__).read_text().splitlines()
    number = next(number for number, line in enumerate(source, 1) if "Invalid Host header" in line)
    record = logging.LogRecord(library.__name__, logging.WARNING, library.__file__, number, "", None, None)
    assert said(record) == "Invalid Host header: {host}"


def test_reasons_of_the_database_quote_no_rows() -> None:
    detail = {"detail": f"Key (name)=({MARK}) already exists.", "sqlstate": "23505", "constraint_name": "names_key"}
    twice = asyncpg.PostgresError.new({"C": "23505", "M": "duplicate", "D": detail["detail"], "n": "names_key"})
    assert error_text(twice) == "UniqueViolationError, SQLSTATE 23505, names_key"
    malformed = asyncpg.PostgresError.new({"C": "22P02", "M": f"invalid input syntax for type integer: {MARK}"})
    assert MARK not in error_text(malformed)
    missing = asyncpg.PostgresError.new({"C": "42703", "M": 'column "x" does not exist', "D": MARK})
    assert error_text(missing) == 'UndefinedColumnError: column "x" does not exist'
    assert MARK not in error_text(asyncpg.exceptions._base.DataError(f"invalid input for query argument $1: {MARK}"))
    assert error_text(ConnectionError("gone")) == "ConnectionError: gone"


def test_a_json_line_has_the_time_by_rfc_3339_and_the_node() -> None:
    written = io.StringIO()
    record = logging.LogRecord("fastmcp.server", logging.INFO, __file__, 1, "hello", (), None)
    record.created = 0.1234
    logs.handler("json", written, "node-1").handle(record)
    line = json.loads(written.getvalue())
    assert (line["time"], line["node"], line["level"]) == ("1970-01-01T00:00:00.123Z", "node-1", "info")


def test_a_session_is_called_by_what_leads_to_no_session() -> None:
    of_node = f"node-1-{'0f' * 16}"
    assert session_alias(of_node) == f"node-1-{hashlib.sha256(of_node.encode()).hexdigest()[:32]}"
    assert of_node[-32:] not in session_alias(of_node)
    assert len(session_alias("made elsewhere")) == 32
