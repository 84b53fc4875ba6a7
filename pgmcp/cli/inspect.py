"""``pgmcp nodes|sessions|requests``: what the public views show."""

from __future__ import annotations

import io
import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgmcp.cli.options import load, settings_options
from pgmcp.errors import SettingsError
from pgmcp.settings import Settings
from pgmcp.store.commands import views

WIDTH = 10_000
"""Columns of a line at most: a row is one line, and no cell is cut for the sake of a terminal's width."""

DATABASE = ("database_url", "database_url_file", "schema_name")


def _command(name: str, view: str, text: str) -> click.Command:
    @click.command(name, help=text)
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON array, one row a line.")
    @settings_options(only=DATABASE)
    def show(as_json: bool, given: dict[str, Any]) -> None:
        _list(name, view, load(given), as_json=as_json)

    return show


def _list(name: str, view: str, settings: Settings, *, as_json: bool) -> None:
    _check_database(settings)
    rows = views.fetch(settings.database_url, settings.schema_name, view)
    click.echo(_array(rows) if as_json else _table(rows, empty=f"no {name}"))


def _check_database(settings: Settings) -> None:
    if not settings.database_url:
        message = "No database. Give --database-url or --database-url-file, or set PGMCP_DATABASE_URL."
        raise SettingsError(message)


nodes = _command("nodes", "live_nodes", "List the nodes that hold a lease.")
requests = _command("requests", "live_requests", "List the requests that are not finished.")


@click.group(invoke_without_command=True, short_help="List the sessions, or show one.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, one row a line.")
@settings_options(only=DATABASE)
@click.pass_context
def sessions(ctx: click.Context, as_json: bool, given: dict[str, Any]) -> None:
    """List the sessions and their owners; `pgmcp sessions show ID` tells of one."""
    ctx.obj = (given, as_json)
    if ctx.invoked_subcommand is None:
        _list("sessions", "live_sessions", load(given), as_json=as_json)


@sessions.command()
@click.argument("session")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with the rows of each view.")
@settings_options(only=DATABASE)
@click.pass_context
def show(ctx: click.Context, session: str, as_json: bool, given: dict[str, Any]) -> None:
    """Show one session, its requests, its streams, and where it has been.

    SESSION is its id as `pgmcp sessions` prints it, or what a node's log calls it.
    """
    before, json_before = ctx.obj
    settings = load({**before, **given})
    _check_database(settings)
    found = views.session(settings.database_url, settings.schema_name, session)
    if as_json or json_before:
        click.echo(json.dumps(found, default=str))
        return
    for view, rows in found.items():
        click.echo(f"{view}:\n{_table(rows, empty='nothing')}")


def _array(rows: list[dict[str, object]]) -> str:
    lines = ",\n".join(json.dumps(row, default=str) for row in rows)
    return f"[\n{lines}\n]" if rows else "[]"


def _table(rows: list[dict[str, object]], empty: str) -> str:
    if not rows:
        return empty
    table = Table(*rows[0], box=None, pad_edge=False, header_style="")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    output = io.StringIO()
    Console(file=output, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _cell(value: object) -> str:
    text = "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
    # A row is one line, whatever a client calls itself: its control characters must not reach the terminal.
    return "".join(sign if sign.isprintable() else "?" for sign in text)
