"""What rows of statements say, as the layers above want it."""

from __future__ import annotations

import asyncpg

from pgmcp.store.repeats import Known
from pgmcp.types import Claimed, NodeId, Ownership, RequestKey, SessionFacts, SessionKey, StreamId


def facts_of(row: asyncpg.Record, session: int) -> SessionFacts:
    """What a row says of its session."""
    return SessionFacts(
        SessionKey(session),
        NodeId(row["owner"]),
        row["epoch"],
        row["protocol_version"],
        row["orphaned"],
        row.get("owner_name"),
    )


def known_of(row: asyncpg.Record) -> Known:
    """What a row of an accept says of the request that has its id."""
    return Known(
        RequestKey(row["known_id"]),
        None if row["known_stream"] is None else StreamId(row["known_stream"]),
        row["same"],
        row["finished"],
        row["attached"],
        row["whole"],
    )


def claimed_of(row: asyncpg.Record, body: bytes) -> Claimed:
    """A message that was claimed."""
    return Claimed(
        key=RequestKey(row["id"]),
        ownership=Ownership(SessionKey(row["session"]), row["epoch"]),
        rpc_id=row["rpc_id"],
        method=row["method"],
        body=body,
        context=row["context"],
        stream=None if row["stream"] is None else StreamId(row["stream"]),
        next_seq=row["next_seq"] or 1,
    )
