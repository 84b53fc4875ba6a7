"""Log lines, as text for people or as JSON for machines. Neither carries message contents, tokens or session ids."""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal
from urllib.parse import unquote_plus

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One object a line."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(style: Literal["text", "json"]) -> None:
    """Send every log line of the process to standard error, in one style, whoever had set it up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if style == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # that a node runs, it says itself


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
