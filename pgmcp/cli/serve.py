"""``pgmcp serve``: one node, or several on one port."""

from __future__ import annotations

from typing import Any

import click

from pgmcp import node
from pgmcp.cli.options import WORKERS, WORKERS_TEXT, Grouped, arguments, environment, load, settings_options
from pgmcp.cli.workers import supervise
from pgmcp.ops.logs import configure


@click.command(cls=Grouped)
@click.argument("target")
@click.option(
    "--workers",
    type=click.IntRange(*WORKERS),
    default=1,
    envvar="PGMCP_WORKERS",
    help=f"{WORKERS_TEXT} [PGMCP_WORKERS; default 1]",
)
@click.option("--shared-port", is_flag=True, hidden=True, help="Listen beside others on the port: for workers.")
@settings_options()
@click.pass_context
def serve(ctx: click.Context, target: str, workers: int, given: dict[str, Any], *, shared_port: bool) -> None:
    """Serve TARGET on one node until a signal drains it.

    TARGET is the MCP server: module:attribute or path/to/file.py:attribute. Each option is also a variable. SIGTERM,
    SIGINT and SIGHUP drain the node, a second one ends it at once.
    """
    settings = load(given)
    if workers == 1 or shared_port:
        ctx.exit(node.serve(settings, target, shared_port=shared_port))
    configure(settings.log_format)
    rest = {name: value for name, value in given.items() if name not in {"node_name", "port"}}
    ctx.exit(supervise(settings, [target, *arguments(rest)], environment(rest), workers))
