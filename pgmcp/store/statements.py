"""Named SQL statements, read once from ``sql/*.sql``."""

from __future__ import annotations

import re
from enum import StrEnum
from functools import cache
from importlib import resources

from pgmcp.types import JUMP


class LockWait(StrEnum):
    """How long a grouped write waits for each lock: a statement has one text for each."""

    USUAL = "250ms"
    BRIEF = "20ms"


_NAME = re.compile(r"^-- name: ([a-z_]+)\s*$", re.MULTILINE)


@cache
def _texts() -> dict[str, str]:
    texts: dict[str, str] = {}
    for file in sorted(resources.files("pgmcp.store").joinpath("sql").iterdir(), key=lambda entry: entry.name):
        parts = _NAME.split(file.read_text("utf-8"))
        for name, body in zip(parts[1::2], parts[2::2], strict=True):
            if name in texts:
                message = f"two statements are named {name}"
                raise ValueError(message)
            texts[name] = body.strip().rstrip(";")
    return texts


def names() -> list[str]:
    """Every statement's name."""
    return sorted(_texts())


@cache
def statement(name: str, schema: str, lock_wait: LockWait = LockWait.USUAL) -> str:
    """The text of one statement for one schema; the schema's name was checked by the settings.

    Args:
        lock_wait: how long a grouped write may wait for each lock.
    """
    text = _texts()[name].replace("{schema}", f'"{schema}"').replace("{jump}", str(JUMP))
    return f"/* {name} */ " + text.replace("{lock_wait}", lock_wait)
