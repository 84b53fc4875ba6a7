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
from pgmcp.store.commands import views

WIDTH = 10_000
"""Columns of a line at most: a row is one line, and no cell is cut for the sake of a terminal's width."""


def _command(name: str, view: str, text: str) -> click.Command:
    @click.command(name, help=text)
    @click.option("--json", "as_json", is_flag=True, help="Print a JSON array, one row a line.")
    @settings_options(only=("database_url", "database_url_file", "schema_name"))
    def show(as_json: bool, given: dict[str, Any]) -> None:
        settings = load(given)
        if not settings.database_url:
            message = "No database. Give --database-url or --database-url-file, or set PGMCP_DATABASE_URL."
            raise SettingsError(message)
        rows = views.fetch(settings.database_url, settings.schema_name, view)
        click.echo(_array(rows) if as_json else _table(rows, empty=f"no {name}"))

    return show


nodes = _command("nodes", "live_nodes", "List the nodes that hold a lease.")
sessions = _command("sessions", "live_sessions", "List the sessions and their owners.")
requests = _command("requests", "live_requests", "List the requests that are not finished.")


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
