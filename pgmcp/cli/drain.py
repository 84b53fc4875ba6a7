"""``pgmcp drain``: tell a node to leave."""

from __future__ import annotations

import json
from typing import Any

import click

from pgmcp.cli.options import load, settings_options
from pgmcp.store.commands import node_commands

WAIT_SECONDS = 60.0
"""Seconds: more than a node's notice and limit take by default."""


@click.command(short_help="Have a node hand its sessions over and leave.")
@click.argument("node")
@click.option("--wait/--no-wait", default=True, help="Return when the node has left, or at once. [default: wait]")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=WAIT_SECONDS,
    help=f"Seconds to wait. [default {WAIT_SECONDS:g}]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@settings_options(only=("database_url", "database_url_file", "schema_name"))
def drain(node: str, wait: bool, timeout: float, as_json: bool, given: dict[str, Any]) -> None:
    """Have NODE (a name or an id of `pgmcp nodes`) hand its sessions over and leave, as after SIGTERM.

    Its process ends with code 0. Whatever restarts processes that end may start it again.
    """
    settings = load(given)
    commanded = node_commands.drain(settings.database_url, settings.schema_name, node, wait=timeout if wait else 0)
    if as_json:
        facts = {"node_id": commanded.node_id, "node_name": commanded.node_name, "state": str(commanded.state)}
        click.echo(json.dumps(facts))
    else:
        how = "has left" if commanded.state == "left" else "drains"
        click.echo(f"Node {commanded.node_name} ({commanded.node_id}) {how}.")
