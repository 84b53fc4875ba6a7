"""``pgmcp serve``: one node, or several on one port."""

from __future__ import annotations

from typing import Any

import click

from pgmcp import node
from pgmcp.cli.options import (
    WORKERS,
    WORKERS_TEXT,
    Grouped,
    arguments,
    environment,
    factory_option,
    load,
    settings_options,
)
from pgmcp.cli.workers import supervise
from pgmcp.ops.logs import configure
from pgmcp.session.target import check


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
@factory_option
@settings_options()
@click.pass_context
def serve(
    ctx: click.Context, target: str, workers: int, given: dict[str, Any], *, factory: bool, shared_port: bool
) -> None:
    """Serve TARGET on one node until a signal drains it.

    TARGET is the MCP server: module:attribute or path/to/file.py:attribute. Each option is also a variable. SIGTERM,
    SIGINT and SIGHUP drain the node, a second one ends it at once.
    """
    settings = load(given)
    if workers == 1 or shared_port:
        ctx.exit(node.serve(settings, target, factory=factory, shared_port=shared_port))
    check(target)
    configure(settings.log_format, level=settings.log_level, node=settings.node_name or node.host_name())
    rest = {name: value for name, value in given.items() if name not in {"node_name", "port"}}
    passed = [target, *(["--factory"] if factory else []), *arguments(rest)]
    ctx.exit(supervise(settings, passed, environment(rest), workers))
