"""``pgmcp demo``: what a client sees when the nodes of its session die."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click

from pgmcp.cli.demo_scenes import Scenes
from pgmcp.cli.demo_story import Story
from pgmcp.cli.local import LocalCluster
from pgmcp.cli.local_setup import example, local_cluster, of_its_own
from pgmcp.cli.options import settings_options


@click.command(short_help="Show what a client sees while nodes die.")
@click.option("--nodes", "count", type=click.IntRange(4, 16), default=4, show_default=True, help="How many nodes.")
@settings_options(only=("database_url", "schema_name", "port"))
@click.pass_context
def demo(ctx: click.Context, count: int, given: dict[str, Any]) -> None:
    """Show what a client sees while nodes die: a cluster, the official client, and times.

    Two owners are killed and one is frozen in the middle of calls. The cluster is one of its own, on free ports
    (without --port) and on an embedded PostgreSQL; in the database of --database-url, if that is given here (variables
    do not count), it makes a schema and drops it at the end. Exit code 0 only if nothing was lost. Ctrl-C stops it
    all, with code 1.
    """
    story = Story()
    story.scene("A cluster on this machine")
    story.say(f"starting PostgreSQL and {count} nodes")
    options = of_its_own({"port": 0} | given)
    with local_cluster(options, example("demo"), count, story.say, passing=True) as (cluster, database):
        code = _play(cluster, database, story)
    ctx.exit(code)


def _play(cluster: LocalCluster, database: str, story: Story) -> int:
    """Run the cluster for as long as the story takes; the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="pgmcp-demo-"))
    ledger, log = folder / "ledger", folder / "nodes.log"
    with log.open("a") as output:
        logging.basicConfig(stream=output, level=logging.INFO)  # what the client's library says
        cluster.output = output
        cluster.env |= {"DEMO_LEDGER": str(ledger), "PGMCP_DRAIN_NOTICE": "0"}
        failed = asyncio.run(cluster.run(Scenes(cluster, database, ledger, story).tell))
    verdict = story.verdict()
    if failed:
        click.echo(f"What the nodes logged is in {log}", err=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return failed or verdict
