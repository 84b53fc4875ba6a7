"""The shipped compose file, read as Docker would, and its nodes as processes of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.harness.processes import REPOSITORY

DOCKER = REPOSITORY / "docker"
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-+])([^${}]*))?\}")


def interpolated(text: str, env: Mapping[str, str]) -> str:
    """Replace ``${NAME}``, ``${NAME:-else}`` and ``${NAME:+instead}``, from the inside out."""

    def value(found: re.Match[str]) -> str:
        name, operator, other = found.groups()
        given = env.get(name, "")
        if operator == ":+":
            return other if given else ""
        return given or other or ""

    while _VARIABLE.search(text):
        text = _VARIABLE.sub(value, text)
    return text


def compose(**env: str) -> dict[str, Any]:
    """The compose file with these variables set."""
    loaded = yaml.safe_load(interpolated((DOCKER / "compose.yaml").read_text(), env))
    assert isinstance(loaded, dict)
    return loaded


def in_checkout(service: Mapping[str, Any], path: str) -> str:
    """A path of a container, with what is mounted there put in the place of the mount."""
    for volume in service.get("volumes", ()):
        source, target, *_ = volume.split(":")
        if source.startswith(".") and path.startswith(target):
            return f"{(DOCKER / source).resolve()}{path.removeprefix(target)}"
    return path


def of(name: str) -> Path:
    """A file of ``docker/``."""
    return DOCKER / name
