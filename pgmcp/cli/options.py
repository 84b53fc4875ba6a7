"""Command line options, made from the fields of ``Settings``.

Invariant: an option that is not given is not passed on, so that its ``PGMCP_`` variable (or the default) holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from pgmcp.settings import Settings

PREFIX = "PGMCP_"
PGMCP = (sys.executable, "-P", "-m", "pgmcp")
"""Starts another pgmcp process; without -P Python would import from the working directory what has a usual name."""
SECRET = frozenset({"database_url", "listen_url", "secrets_key"})
"""Fields that hold a password or key: handed to other processes by the environment, since `ps` shows arguments."""


class Words(click.ParamType[tuple[str, ...]]):
    """A comma-separated list."""

    name = "a,b,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split at the commas; blanks around a word do not count."""
        if isinstance(value, tuple):
            return value
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


def variable(name: str) -> str:
    """The environment variable of a field."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else PREFIX + name.upper()


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + variable(name).removeprefix(PREFIX).lower().replace("_", "-")


def settings_options(
    *, only: Collection[str] = (), without: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add an option for each field to a command, which gets those that were given as the dict ``given``.

    Args:
        only: the fields to offer; empty for all.
        without: fields to leave out.
    """
    names = [name for name in Settings.model_fields if (not only or name in only) and name not in without]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def collect(**arguments: Any) -> Any:
            values = {name: arguments.pop(name) for name in names}
            return command(given={name: value for name, value in values.items() if value is not None}, **arguments)

        decorated: Callable[..., Any] = collect
        for name in reversed(names):
            decorated = _option(name, Settings.model_fields[name])(decorated)
        return decorated

    return decorate


def load(given: Mapping[str, Any]) -> Settings:
    """The settings, with the given options over the environment.

    Raises:
        SettingsError: a value cannot work.
    """
    # A field with an alias must be given by it, or it would stand beside the variable's value instead of over it.
    aliases = {name: Settings.model_fields[name].validation_alias for name in given}
    return Settings(**{str(aliases[name] or name): value for name, value in given.items()})


def arguments(given: Mapping[str, Any]) -> list[str]:
    """The given options as arguments of another pgmcp process; secrets are left out (see ``environment``)."""
    parts: list[str] = []
    for name, value in given.items():
        if name in SECRET:
            continue
        if isinstance(value, bool):
            parts.append(flag(name) if value else _no(name))
        else:
            parts += [flag(name), ",".join(value) if isinstance(value, tuple) else str(value)]
    return parts


def environment(given: Mapping[str, Any]) -> dict[str, str]:
    """The given options that hold secrets, as variables for another pgmcp process."""
    return {variable(name): str(value) for name, value in given.items() if name in SECRET}


def factory_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option that says that a target makes the server."""
    text = "TARGET is a function without arguments, async or not, that returns the server. [PGMCP_FACTORY]"
    return click.option("--factory", is_flag=True, envvar="PGMCP_FACTORY", help=text)(command)


def _no(name: str) -> str:
    return f"--no-{flag(name)[2:]}"


def _option(name: str, field: FieldInfo) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if default in ("", None) else f"; default {default}"
    text = f"{field.description} [{variable(name)}{shown}]"
    kind = field.annotation
    if kind is bool:
        return click.option(f"{flag(name)}/{_no(name)}", name, default=None, help=text)
    return click.option(flag(name), name, type=_type(kind), default=None, help=text)


def _type(kind: Any) -> click.ParamType[Any]:
    if get_origin(kind) is Literal:
        return click.Choice([str(choice) for choice in get_args(kind)])
    if get_origin(kind) is tuple:
        return Words()
    numbers: dict[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT}
    return numbers.get(kind, click.STRING)
