"""Which revisions of the schema this build knows, and whether it fits a database: what every node asks.

Alembic, which runs the migrations, takes longer to load than all the rest of a node but the SDK; so nodes read the
revisions off the names of the migrations' files.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from pgmcp.errors import SchemaError
from pgmcp.store.connection.one_shot import checked

VERSION_TABLE = "alembic_version"
OLDEST = "0020"
"""The oldest revision with everything that this build's statements use."""

LOOK_SECONDS = 10.0  # seconds for a call that only reads


@dataclass(frozen=True, slots=True)
class Shape:
    """A database's revision, and the one that a build has to know; None: of no migration that writes it."""

    revision: str
    needs: str | None


def folder() -> Path:
    """``pgmcp/migrations`` in an installed wheel, ``migrations`` beside the package in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def _revisions() -> list[str]:
    return [script.name.partition("_")[0] for script in (folder() / "versions").glob("[0-9]*.py")]


def head() -> str:
    """The newest revision that this build knows."""
    return max(_revisions())


def known(revision: str) -> bool:
    """Whether this build has a migration to that revision."""
    return revision in _revisions()


async def understood(connection: asyncpg.Connection | PoolConnectionProxy, schema: str) -> str:
    """The database's revision, when this build can work with it; a node asks before it joins.

    Raises:
        SchemaError: the schema is missing, behind, or needs a newer build; the message says what to run.
        TimeoutError: no answer within ``LOOK_SECONDS``.
    """
    async with asyncio.timeout(LOOK_SECONDS):
        found = await shape(connection, checked(schema))
    return fit(found, schema)


async def shape(connection: asyncpg.Connection | PoolConnectionProxy, schema: str) -> Shape | None:
    """What a database has of pgmcp; None when that is nothing."""
    revision = await _only(connection, schema, VERSION_TABLE, "version_num")
    return Shape(revision, await _only(connection, schema, "schema_range", "needs")) if revision else None


async def _only(
    connection: asyncpg.Connection | PoolConnectionProxy, schema: str, name: str, column: str
) -> str | None:
    """The value in a table of one row; None when there is no table, or no row in it."""
    table = f'"{schema}".{name}'
    if not await connection.fetchval("select to_regclass($1) is not null", table, timeout=LOOK_SECONDS):
        return None
    found: str | None = await connection.fetchval(f"select {column} from {table}", timeout=LOOK_SECONDS)  # noqa: S608
    return found


def fit(found: Shape | None, schema: str) -> str:
    """The database's revision, when this build can work with it.

    Raises:
        SchemaError: the schema is missing, behind, or needs a newer build; the message says what to run.
    """
    if found is None:
        message = f"There are no tables of pgmcp in schema {schema}. Run `pgmcp db upgrade`, or check --schema."
        raise SchemaError(message)
    if found.needs is None:
        refuse_unknown(found, schema)
    if found.needs is None or found.revision < OLDEST:
        message = f"Schema {schema} is at revision {found.revision}, this build needs {OLDEST}. Run `pgmcp db upgrade`."
        raise SchemaError(message)
    if found.needs > head():
        message = (
            f"Schema {schema} is at revision {found.revision} and needs a build that knows {found.needs}; this one's "
            f"newest is {head()}. Upgrade pgmcp, or point --schema or --database-url elsewhere."
        )
        raise SchemaError(message)
    return found.revision


def refuse_unknown(found: Shape, schema: str) -> None:
    """Stop at a revision that only newer builds know.

    Raises:
        SchemaError: it is one.
    """
    if known(found.revision):
        return
    message = (
        f"Schema {schema} is at revision {found.revision}, which this build (newest: {head()}) does not know. "
        f"Upgrade pgmcp, or point --schema or --database-url elsewhere."
    )
    raise SchemaError(message)
