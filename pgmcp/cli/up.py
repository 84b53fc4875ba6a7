"""``pgmcp up``: a whole cluster on this machine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from pgmcp.cli.local import LocalCluster
from pgmcp.cli.local_setup import example, local_cluster
from pgmcp.cli.options import Grouped, factory_option, settings_options

SNIPPET = """\
    import asyncio
    from mcp import Client

    async def main():
        async with Client("{url}", mode="legacy") as client:  # a session; "auto": 2026-07-28, which has none
            print([tool.name for tool in (await client.list_tools()).tools])

    asyncio.run(main())
"""


@click.command(cls=Grouped, short_help="Run a cluster on this machine, to try it.")
@click.argument("target", required=False)
@click.option("--nodes", "count", type=click.IntRange(1, 64), default=3, show_default=True, help="How many nodes.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that keeps the embedded PostgreSQL's data; without it the data go when the cluster stops.",
)
@factory_option
@settings_options(without=("node_name", "address", "wait"))
@click.pass_context
def up(
    ctx: click.Context, target: str | None, count: int, data_dir: Path | None, given: dict[str, Any], *, factory: bool
) -> None:
    """Run a local cluster: PostgreSQL, nodes, and one port that spreads every request over them in turn.

    TARGET is the MCP server, module:attribute or path/to/file.py:attribute; without it an example that uses every
    part of MCP is served. The nodes listen on the ports after --port (0 takes free ones everywhere); without it on
    8001 and so on, or others where those are in use. PostgreSQL is an embedded one, or the one of --database-url:
    there `up` makes its schema, and uses none that it has not made. Ctrl-C, SIGTERM or SIGHUP drains the cluster and
    ends it with code 0; without --drain-notice there is none, since the entry port closes first.
    """
    target = target or example("everything")
    with local_cluster(given, target, count, _report, data_dir) as (cluster, database):
        cluster.options += ["--factory"] if factory else []
        if not cluster.settings.database_url:
            click.echo(f"database  {database}")

        async def announce_and_wait() -> int:
            _announce(cluster)
            await cluster.leaving.wait()
            return 0

        code = asyncio.run(cluster.run(announce_and_wait))
    ctx.exit(code)


def _announce(cluster: LocalCluster) -> None:
    for node in cluster.nodes:
        click.echo(f"{node.name:<8}  {node.url}{cluster.settings.mcp_path}")
    click.echo(f"MCP       {cluster.url}\n\nConnect a client:\n\n{SNIPPET.format(url=cluster.url)}\nready")
    sys.stdout.flush()


def _report(line: str) -> None:
    click.echo(line, err=True)
