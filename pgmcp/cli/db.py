"""``pgmcp db``: the schema of a database, forward and back.

Exit codes: 0 done, 1 failed, 2 usage, 3 the database cannot be reached, 4 the schema is refused, 5 living nodes need
what a migration would take away (those before it were applied).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any, TypeVar, cast

import click

from pgmcp.errors import SchemaError, SchemaInUse
from pgmcp.settings import in_file
from pgmcp.store.commands import identity
from pgmcp.store.schema import grants, migrations, revisions

Command = TypeVar("Command", bound=Callable[..., Any])

_database_url = click.option(
    "--database-url",
    envvar="PGMCP_DATABASE_URL",
    show_envvar=True,
    default="",
    help="PostgreSQL itself, not a transaction pooler: postgresql://user:password@host/db.",
)
_database_url_file = click.option(
    "--database-url-file",
    envvar="PGMCP_DATABASE_URL_FILE",
    show_envvar=True,
    default="",
    help="File with that address.",
)
_schema = click.option(
    "--schema",
    envvar="PGMCP_SCHEMA",
    show_envvar=True,
    default="pgmcp",
    show_default=True,
    help="Schema of the tables.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _connected(command: Command) -> Command:
    """Give a command the options of everything that asks a database."""

    @wraps(command)
    def addressed(database_url: str, database_url_file: str, **arguments: Any) -> Any:
        try:
            url = in_file("database_url", database_url, database_url_file)
        except ValueError as error:
            raise click.UsageError(f"{error}.") from None
        if not url:
            raise click.UsageError("Missing option '--database-url' (or '--database-url-file').")
        return command(database_url=url, **arguments)

    return cast("Command", _database_url(_database_url_file(_schema(_json(addressed)))))


@click.group()
def db() -> None:
    """Create, upgrade and inspect pgmcp's schema."""


@db.command()
@click.argument("revision", default="head")
@click.option(
    "--contract-later",
    is_flag=True,
    help="End with 0 when a contract step has to wait for older nodes: for the job before they are replaced.",
)
@_connected
def upgrade(database_url: str, schema: str, revision: str, contract_later: bool, as_json: bool) -> None:
    """Bring the schema to REVISION (default: head). Safe while nodes run and while others do the same.

    Expand steps are always taken. A contract step is refused (exit code 5) while nodes live that need what it removes.
    """
    before = migrations.current(database_url, schema)
    try:
        migrations.upgrade(database_url, schema, revision)
    except SchemaInUse as error:
        _moved(database_url, schema, before, as_json=as_json, waits=str(error) if contract_later else None)
        if not contract_later:
            raise
    else:
        _moved(database_url, schema, before, as_json=as_json)


@db.command(context_settings={"ignore_unknown_options": True})  # -1 is a revision here, not an option
@click.argument("revision", default="-1")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_connected
def downgrade(database_url: str, schema: str, revision: str, yes: bool, as_json: bool) -> None:
    """Take the schema back to REVISION (default: one step back; base: remove all of pgmcp), with the data."""
    if not yes and sys.stdin.isatty():
        click.confirm(f"Take schema {schema} back to {revision} and lose what is stored there?", abort=True, err=True)
    before = migrations.current(database_url, schema)
    migrations.downgrade(database_url, schema, revision)
    _moved(database_url, schema, before, as_json=as_json)


@db.command()
@_connected
def current(database_url: str, schema: str, as_json: bool) -> None:
    """Print the schema's revision."""
    found, head = migrations.current(database_url, schema), revisions.head()
    if as_json:
        _print_json({"schema": schema, "revision": found, "head": head})
    elif found is None:
        click.echo(f"none: schema {schema} has no tables of pgmcp. Run `pgmcp db upgrade`.")
    else:
        click.echo(f"{found} (head)" if found == head else f"{found} (this build's head: {head})")


@db.command()
@_connected
def history(database_url: str, schema: str, as_json: bool) -> None:
    """List this build's migrations, the newest first, and which of them the schema has."""
    revisions = migrations.history(database_url, schema)
    if as_json:
        _print_json([asdict(each) for each in revisions])
        return
    for each in revisions:
        click.echo(f"{each.revision}  {'applied' if each.applied else 'missing'}  {each.message}")


@db.command()
@_connected
def check(database_url: str, schema: str, as_json: bool) -> None:
    """Compare the schema with what this build expects; exit code 4 when they differ."""
    differences = migrations.check(database_url, schema)
    if as_json:
        _print_json({"schema": schema, "head": revisions.head(), "differences": differences})
    if differences:
        listed = "\n  ".join(differences)
        message = f"Schema {schema} has the right revision, but somebody changed its tables:\n  {listed}"
        raise SchemaError(message)
    if not as_json:
        click.echo(f"Schema {schema} is at revision {revisions.head()} and as this build expects.")


@db.command()
@click.argument("name", required=False)
@_connected
def cluster(database_url: str, schema: str, name: str | None, as_json: bool) -> None:
    """Print what the schema's cluster serves, or let it serve NAME from now on, while no node is there.

    Its first node says it: by --cluster, else by its server's name. Nodes of another server are refused (exit code 6).
    Sessions stay with a new name: for another server take another schema.
    """
    if name is not None:
        identity.rename(database_url, schema, name)
    found = identity.served(database_url, schema)
    if as_json:
        _print_json({"schema": schema, "serves": found})
    else:
        click.echo("nothing yet: the first node says it" if found is None else found)


@db.command()
@click.argument("revision", default="head")
@click.option("--down", is_flag=True, help="Write the way back; REVISION is then from:to, as in 0001:base.")
@_schema
@_json
def sql(schema: str, revision: str, down: bool, as_json: bool) -> None:
    """Print the migrations up to REVISION (or from:to) as SQL for psql. Needs no database."""
    script = migrations.sql(schema, revision, down=down)
    if as_json:
        _print_json({"schema": schema, "revision": revision, "sql": script})
    else:
        click.echo(script, nl=False)


@db.command("grants")
@click.option("--runtime", required=True, metavar="ROLE", help="The role that nodes connect as: rows, no tables.")
@click.option("--reader", default="", metavar="ROLE", help="A role that only looks at the public views.")
@click.option("--owner", default="", metavar="ROLE", help="The role that migrates; default: whoever runs the SQL.")
@_schema
@_json
def print_grants(runtime: str, reader: str, owner: str, schema: str, as_json: bool) -> None:
    """Print the SQL that gives roles their rights on the schema, for psql. Needs no database; make the roles first.

    It may be run before the first migration or after it, and again; what later migrations make is the nodes' by itself.
    """
    script = grants.script(schema, runtime, reader, owner)
    if as_json:
        _print_json({"schema": schema, "sql": script})
    else:
        click.echo(script, nl=False)


def _moved(database_url: str, schema: str, before: str | None, *, as_json: bool, waits: str | None = None) -> None:
    """Say where the schema was and where it is now, and what waits."""
    after = migrations.current(database_url, schema)
    if as_json:
        _print_json({"schema": schema, "before": before, "revision": after} | ({"waits": waits} if waits else {}))
        return
    if before == after:
        click.echo(f"Schema {schema} was already at {after or 'base'}.")
    else:
        click.echo(f"Schema {schema}: {before or 'base'} -> {after or 'base'}.")
    if waits:
        click.echo(waits)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))
