"""``pgmcp serve``: one node."""

from __future__ import annotations

from typing import Any

import click

from pgmcp.cli.options import load, settings_options
from pgmcp.node import serve as run_node


@click.command()
@click.argument("target")
@settings_options()
@click.pass_context
def serve(ctx: click.Context, target: str, given: dict[str, Any]) -> None:
    """Serve TARGET on one node until SIGTERM, which drains it.

    TARGET is the MCP server: module:attribute or path/to/file.py:attribute. Each option is also a variable.
    """
    ctx.exit(run_node(load(given), target))
