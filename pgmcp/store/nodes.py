"""The node's own row, as far as it is not written on the line."""

from __future__ import annotations

from pgmcp.errors import OtherServer, SchemaError, SchemaGone, SchemaInUse
from pgmcp.store.database import Database
from pgmcp.store.schema.revisions import OLDEST, head
from pgmcp.types import NodeId, NodeRecord, NodeState

READS_SEALED = "0019"
"""The revision that a build knows which reads sealed payloads."""


async def join(database: Database, record: NodeRecord) -> None:
    """Write the row of a node that joins, with the range of schemas that its build fits; a repeat finds its own row.

    Raises:
        DatabaseUnavailable: PostgreSQL does not answer.
        SchemaError: a contract step has taken away what this build needs.
        OtherServer: the cluster serves something else.
    """
    # Asked first: the statement that writes the row may be what does not fit any more.
    if problem := await outgrown(database):
        raise problem
    rows = await database.persist(
        "join",
        record.node_id,
        record.name,
        record.address,
        database.settings.ttl,
        record.version,
        record.schema_revision,
        OLDEST,
        head(),
        record.serves,
        patience=database.settings.statement_timeout,
    )
    if not rows:
        message = f"The database needs a build that is newer than {head()}, this one's newest revision. Upgrade pgmcp."
        raise SchemaError(message)
    if rows[0]["serves"] != record.serves:
        raise _other(database, rows[0]["serves"], record.serves)


def _other(database: Database, theirs: str, ours: str) -> OtherServer:
    schema = database.settings.schema_name
    return OtherServer(
        f"The cluster in schema {schema} serves {theirs!r}, this node {ours!r}: sessions would move between different "
        f"servers. Give this one a schema of its own (--schema). If it is the same server under another name, start it "
        f"with --cluster {theirs!r}, or stop all nodes and run `pgmcp db cluster {ours!r}`."
    )


async def outgrown(database: Database) -> SchemaError | None:
    """Why this build does not fit the schema: it is gone, older, or needs a newer build; None while it fits.

    Raises:
        DatabaseUnavailable: PostgreSQL does not answer.
    """
    try:
        await database.revision()
    except SchemaGone:
        raise
    except SchemaError as problem:
        return problem
    return None


async def no_older(database: Database) -> None:
    """See to it that no node lives, or joins, whose build cannot read what is sealed.

    Raises:
        DatabaseUnavailable: PostgreSQL does not answer.
        SchemaInUse: there is one.
    """
    # Twice: the first time a node that is just joining may not be seen; the second time nobody joins any more.
    for _ in range(2):
        if rows := await database.persist("no_older", READS_SEALED, patience=database.settings.statement_timeout):
            message = (
                f"Node {rows[0]['name']} is of an older build, which cannot read encrypted payloads. Replace all nodes "
                f"by this build before you give any of them --encrypt-payloads."
            )
            raise SchemaInUse(message)


async def own_state(database: Database, node: NodeId) -> NodeState | None:
    """The state in a node's row; None when it was removed.

    Raises:
        DatabaseUnavailable: PostgreSQL does not answer.
    """
    rows = await database.ask("own_state", node)
    return NodeState(rows[0]["state"]) if rows else None
