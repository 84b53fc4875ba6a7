"""``pgmcp nodes|sessions|requests``: what the public views show."""

from __future__ import annotations

import json
from typing import Any

import click

from pgmcp.cli.options import load, settings_options
from pgmcp.errors import SettingsError
from pgmcp.store import views


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
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: object) -> str:
    text = "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
    # A row is one line, whatever a client calls itself: its control characters must not reach the terminal.
    return "".join(sign if sign.isprintable() else "?" for sign in text)
