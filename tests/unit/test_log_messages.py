"""The page that says what each message in the log means has every one of them, and none that nobody logs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pgmcp
from pgmcp.ops import redaction

PACKAGE = Path(pgmcp.__file__).parent
PAGE = PACKAGE.parent / "docs" / "log-messages.md"
LOUD = {"warning", "error", "exception", "critical", "log"}
ENTRY = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
LEAST = 25
"""Characters of a long message that the page has at least."""


def loud_calls() -> Iterator[tuple[str, ast.Call]]:
    """Each call in pgmcp by which a line of a warning or worse is logged, and where it stands."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(attr=attr, value=ast.Name(id="logger"))) if attr in LOUD:
                    yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", node


def message(call: ast.Call) -> str | None:
    """What stands in the source, with a sign where something is filled in."""
    text = call.args[1 if isinstance(call.func, ast.Attribute) and call.func.attr == "log" else 0]
    if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
        return None
    return re.sub(r"%[-\d.]*[sdgfr]", "…", text.value)


def documented(entry: str, text: str) -> bool:
    """Whether an entry of the page is a message, or its beginning."""
    begins = len(entry) > LEAST and entry.endswith("…") and text.startswith(entry.rstrip("…").rstrip())
    return entry == text or begins


def test_each_message_is_in_the_page_and_each_entry_is_a_message() -> None:
    texts = {where: message(call) for where, call in loud_calls()}
    assert len(texts) > 40, "the calls are found"
    filled = [where for where, text in texts.items() if text is None]
    assert not filled, f"the first argument is to be a text in the source, with what is filled in after it: {filled}"
    entries = ENTRY.findall(PAGE.read_text(encoding="utf-8"))
    missing = {
        where: text for where, text in texts.items() if not any(documented(entry, str(text)) for entry in entries)
    }
    assert not missing, "\n".join(f"{where}: {text}" for where, text in missing.items())
    stale = [entry for entry in entries if not any(documented(entry, str(text)) for text in texts.values())]
    assert not stale, stale
    assert len(entries) == len(set(entries))


def test_nobody_logs_by_another_name() -> None:
    """What ``loud_calls`` does not find would not be in the page: the one exception is what other libraries warn of."""
    others = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if re.search(r"getLogger\([^)]*\)\.(?:warning|error|exception|critical)", path.read_text(encoding="utf-8"))
    ]
    assert others == [Path(redaction.__file__).name]


def test_internal_numbers_of_sessions_and_streams_are_in_no_line() -> None:
    """They can be given to no command: lines call a session by its alias (``pgmcp sessions show``)."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"))):
                    given = {ast.unparse(each).rpartition(".")[2] for each in node.args[1:]}
                    assert not given & {"session", "stream", "ownership", "key"}, f"{path}:{node.lineno}"
