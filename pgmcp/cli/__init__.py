"""The command line.

Exit codes:
    0  done
    1  the work failed
    2  the command line or a setting cannot work, or the target is no MCP server
    3  the database cannot be reached
    4  the database's schema is not one that this build understands, or the role lacks rights on it
    5  a migration, or a new name for the cluster, waits for living nodes
    6  the cluster serves another server than this node, which did not join
    7  the port is in use
    8  the served server's lifespan failed
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import IO, Any

import click

from pgmcp import __version__
from pgmcp.errors import (
    DatabaseUnavailable,
    LifespanFailed,
    OtherServer,
    PgmcpError,
    PortTaken,
    SchemaError,
    SchemaInUse,
    SettingsError,
    TargetError,
)
from pgmcp.settings import unknown_variables

COMMANDS = {
    "up": "pgmcp.cli.up:up",
    "demo": "pgmcp.cli.demo:demo",
    "serve": "pgmcp.cli.serve:serve",
    "db": "pgmcp.cli.db:db",
    "nodes": "pgmcp.cli.inspect:nodes",
    "sessions": "pgmcp.cli.inspect:sessions",
    "requests": "pgmcp.cli.inspect:requests",
    "drain": "pgmcp.cli.drain:drain",
}

NODES_SAY_IT = frozenset({"serve", "up"})
"""Commands whose nodes name unknown variables in their log."""

EXIT_CODES: tuple[tuple[type[PgmcpError], int], ...] = (
    (SettingsError, 2),
    (TargetError, 2),
    (SchemaInUse, 5),
    (SchemaError, 4),
    (DatabaseUnavailable, 3),
    (OtherServer, 6),
    (PortTaken, 7),
    (LifespanFailed, 8),
    (PgmcpError, 1),
)


class _Failure(click.ClickException):
    """An error of ours on its way out: its message, and the exit code of its kind."""

    def __init__(self, error: PgmcpError) -> None:
        super().__init__(str(error) or (type(error).__doc__ or "").strip())
        self.exit_code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))  # type: ignore[misc]
        self._trace = error.trace if isinstance(error, TargetError) else ""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the trace of the user's own code, where that failed, and the message."""
        if self._trace:
            click.echo(self._trace, file=file, err=file is None)
        super().show(file)


class Commands(click.Group):
    """Loads a command when it is called, so that each pays only for its own imports; turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of ours ends with its message and its exit code, without a traceback."""
        try:
            return super().invoke(ctx)
        except PgmcpError as error:
            raise _Failure(error) from error


@click.group(cls=Commands)
@click.version_option(__version__, package_name="pgmcp")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run an unchanged MCP server on many nodes, with PostgreSQL as the only coordinator.

    To try it: `pgmcp up server.py:mcp`. With a PostgreSQL of your own: `pgmcp db upgrade` once, then on each node
    `pgmcp serve server.py:mcp`.

    Exit codes: 0 done, 1 failed, 2 wrong usage or setting, 3 database unreachable, 4 schema refused, 5 schema in use,
    6 another server's cluster, 7 port in use, 8 the served server's lifespan failed.
    """
    if ctx.invoked_subcommand not in NODES_SAY_IT:
        for line in unknown_variables(os.environ):
            click.echo(f"Warning: {line}", err=True)
