"""Command line options, made from the fields of ``Settings``.

Invariant: an option that is not given is not passed on, so that its ``PGMCP_`` variable (or the default) holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from functools import wraps
from typing import Any, Literal, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from pgmcp.settings import PREFIX, Settings, seconds, variable, written

GROUPS = {
    "Database": (
        "database_url", "database_url_file", "listen_url", "listen_url_file", "schema_name", "cluster", "wait",
        "pool_size", "statement_timeout",
    ),
    "Address": ("host", "port", "node_name", "address", "affinity_cookie"),
    "Endpoints": ("eras", "mcp_path", "sse_path", "messages_path", "middleware"),
    "Who may come in": (
        "allowed_hosts", "allowed_origins", "cors_origins", "forwarded_allow_ips", "bind_to", "rate", "initialize_rate",
    ),
    "Sessions and streams": (
        "response", "idle_timeout", "max_age", "retention", "rerun", "on_owner_change", "single_use_states", "hold",
        "resume_hold", "keepalive", "retry_ms",
    ),
    "Stopping": ("drain_notice", "drain_limit"),
    "Log": ("log_format", "log_level", "access_log"),
    "Keys": ("secrets_key", "secrets_key_file", "encrypt_payloads", "key_rotation"),
    "Limits": (
        "max_body", "max_message", "max_batch", "max_elements", "max_depth", "max_sessions", "max_sessions_per_caller",
        "max_in_flight", "max_streams", "max_connections", "max_exchanges", "max_listens", "max_waiting_events",
        "read_timeout", "write_timeout",
    ),
    "Lease and polling (the defaults suit nearly all)": ("renew", "deadline", "trust", "ttl", "poll", "idle_poll"),
}  # fmt: skip
"""Settings as they stand together in help and reference."""

DURATIONS = "Durations are plain seconds, or have a unit: 250ms, 1.5s, 5m, 12h, 30d."
WORKERS, WORKERS_TEXT = (1, 64), "Processes on this port, each a node of its own."
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


class Duration(click.ParamType[float]):
    """Seconds, or a number with a unit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds."""
        try:
            return float(seconds(value))  # type: ignore[arg-type]
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class Grouped(click.Command):
    """A command whose help has its settings in groups, after its own options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
        records = {
            param.name or "": record
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None
        }
        grouped = {title: [records.pop(name) for name in names if name in records] for title, names in GROUPS.items()}
        for title, listed in ({"Options": list(records.values())} | grouped).items():
            if listed:
                with formatter.section(title):
                    formatter.write_dl(listed)
        formatter.write_paragraph()
        formatter.write_text(DURATIONS)


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
            parts += [flag(name), ",".join(value) if isinstance(value, tuple) else _argument(value)]
    return parts


def _argument(value: object) -> str:
    return f"{Decimal(str(value)):f}" if isinstance(value, float) else str(value)  # durations have no exponents


def environment(given: Mapping[str, Any]) -> dict[str, str]:
    """The given options that hold secrets, as variables for another pgmcp process."""
    return {variable(name): str(value) for name, value in given.items() if name in SECRET}


def factory_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option that says that a target makes the server."""
    text = "TARGET is a function without arguments, async or not, that returns the server. [PGMCP_FACTORY]"
    return click.option("--factory", is_flag=True, envvar="PGMCP_FACTORY", help=text)(command)


def _no(name: str) -> str:
    return f"--no-{flag(name)[2:]}"


def is_duration(field: FieldInfo) -> bool:
    """Whether a field is a number of seconds that may be written with a unit."""
    return any(getattr(each, "func", None) is seconds for each in field.metadata)


def default_of(field: FieldInfo) -> str:
    """A field's default as one would write it; empty for none."""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return ",".join(field.default)
    if isinstance(field.default, float):
        return written(field.default) if is_duration(field) else f"{field.default:g}"
    return str(field.default)


def range_of(field: FieldInfo) -> str:
    """The values that a field may have; empty where any will do."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(str(choice) for choice in get_args(field.annotation))
    low = next((each.ge for each in field.metadata if isinstance(each, Ge)), None)
    above = next((each.gt for each in field.metadata if isinstance(each, Gt)), None)
    high = next((each.le for each in field.metadata if isinstance(each, Le)), None)
    if field.annotation is int and above is not None:
        low, above = above + 1, None  # type: ignore[operator]
    least = "" if low is None else _shown(field, low)
    if high is not None:
        return f"{least} to {_shown(field, high)}"
    return f"{least} or more" if least else "" if above is None else f"more than {above}"


def _shown(field: FieldInfo, bound: Any) -> str:
    return written(bound) if is_duration(field) else f"{bound}"


def _option(name: str, field: FieldInfo) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind = field.annotation
    allowed = "" if get_origin(kind) is Literal else range_of(field)  # a choice shows its words before
    default = default_of(field)
    facts = (variable(name), allowed, f"default {default}" if default else "")
    text = f"{field.description} [{'; '.join(filter(None, facts))}]"
    if kind is bool:
        return click.option(f"{flag(name)}/{_no(name)}", name, default=None, help=text)
    type_ = Duration() if is_duration(field) else _type(kind)
    return click.option(flag(name), name, type=type_, default=None, help=text)


def _type(kind: Any) -> click.ParamType[Any]:
    if get_origin(kind) is Literal:
        return click.Choice([str(choice) for choice in get_args(kind)])
    if get_origin(kind) is tuple:
        return Words()
    numbers: dict[Any, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT}
    return numbers.get(kind, click.STRING)
