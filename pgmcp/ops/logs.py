"""Log lines, as text for people or as JSON for machines. Neither carries message contents, tokens or session ids.

In JSON each has the time by RFC 3339 (UTC) and the node's name, whoever logs it.

Invariants:
- One event is one line, whatever is in it: control characters, line ends of all kinds, lone surrogates and what turns
  the direction of text are escaped, in messages, loggers' names and traces alike. So nobody can forge a line.
- What libraries and pgmcp itself log shows nothing that clients sent (``redaction``).

Failure handling: a record that cannot be written is replaced by a line that names its logger.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from datetime import UTC, datetime
from typing import IO, Any, Literal
from urllib.parse import unquote_plus

from pgmcp.ops.redaction import LIBRARIES, capture_warnings, said, trace

logger = logging.getLogger(__name__)

Level = Literal["debug", "info", "warning", "error"]

_UNFIT = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def _escaped(text: str) -> str:
    return _UNFIT.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line; a trace comes behind the message, its line ends escaped."""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {said(record)}"
        return _escaped("\n".join(filter(None, (line, trace(record), record.stack_info))))


class _Json(logging.Formatter):
    def __init__(self, node: str = "") -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        """One object a line; json.dumps escapes whatever is not printable ASCII."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "node": self._node,
            "logger": record.name,
            "message": said(record),
        }
        if record.name.startswith("pgmcp."):
            line |= getattr(record, "fields", {})
        if traced := trace(record):
            line["traceback"] = traced
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line)


class _Handler(logging.StreamHandler[IO[str]]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say in one line that a record could not be written; logging's own way prints it and its arguments."""
        failed = sys.exc_info()[1]
        if isinstance(failed, OSError):
            return  # there is nowhere to say it
        text = f"a record of {record.name!a} could not be written: {type(failed).__name__}"
        lost = logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None)
        try:
            self.stream.write(self.format(lost) + self.terminator)
            self.flush()
        except OSError:
            return


def handler(style: Literal["text", "json"], stream: IO[str], node: str = "") -> logging.Handler:
    """What writes log lines in one style; those in JSON name the node."""
    made = _Handler(stream)
    made.setFormatter(_Json(node) if style == "json" else _Text())
    return made


def configure(style: Literal["text", "json"], *, level: Level = "info", node: str = "") -> None:
    """Send every log line of the process to standard error, in one style, whoever had set it up before.

    Args:
        level: the least of what is written, whoever logs it; the access log has a switch of its own.
        node: the node's name.
    """
    os.environ["FASTMCP_LOG_ENABLED"] = "false"  # or it brings its own handlers whenever it is first imported
    logging.basicConfig(level=level.upper(), handlers=[handler(style, sys.stderr, node)], force=True)
    for name, known in logging.root.manager.loggerDict.items():
        if isinstance(known, logging.Logger) and name.partition(".")[0] in LIBRARIES:
            known.handlers.clear()  # FastMCP has some of its own, which print whole messages
            known.propagate = True
            if name == "fastmcp":
                known.setLevel(logging.NOTSET)
    capture_warnings()
    sys.unraisablehook = lambda lost: _nobody_caught(lost.exc_value)
    threading.excepthook = lambda lost: _nobody_caught(lost.exc_value)
    # That a node runs, it says itself.
    logging.getLogger("uvicorn.error").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    logging.getLogger("pgmcp.access").setLevel(logging.INFO)


def _nobody_caught(error: BaseException | None) -> None:
    logger.error("an error that nobody could catch", exc_info=error)


def mask_session_ids() -> None:
    """Keep the session ids of HTTP+SSE out of uvicorn's own access log, which writes query strings (G8)."""
    logging.getLogger("uvicorn.access").addFilter(_masked)


def _masked(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(_without_id(arg) if isinstance(arg, str) else arg for arg in record.args)
    return True


def _without_id(target: str) -> str:
    path, mark, query = target.partition("?")
    parts = [part.partition("=") for part in query.split("&")]
    return (
        path
        + mark
        + "&".join(
            f"{name}=***" if unquote_plus(name) == "session_id" else name + equals + value
            for name, equals, value in parts
        )
    )
