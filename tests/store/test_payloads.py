"""Sealed payloads: nothing of them in clear, whoever has stored them, and every look at them as before."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from pgmcp.errors import DuplicateRequest, PgmcpError, SchemaInUse, SettingsError
from pgmcp.settings import Settings
from pgmcp.store.encryption.payloads import SEALED, place_of_body, wanted
from pgmcp.store.nodes import join, no_older
from pgmcp.types import (
    PAGE_BYTES,
    Attachment,
    Cursor,
    Entry,
    JournalEntry,
    NodeId,
    NodeRecord,
    NodeState,
    Ownership,
    RequestKey,
    StreamId,
)
from tests.harness.stores import IDS, Store, opened, request, store

KEY = "k" * 32
BODY = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"add","arguments":{"text":"MARKER"}}}'
ASKED = b'{"jsonrpc":"2.0","id":"pgmcp-1","method":"elicitation/create","params":{"message":"MARKER"}}'


@asynccontextmanager
async def node(address: str, *, seals: bool = True, **settings: Any) -> AsyncIterator[Store]:
    async with store(address, secrets_key=KEY, encrypt_payloads=seals, **settings) as made:
        yield made


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
async def sealer(database: str) -> AsyncIterator[Store]:
    async with node(database) as made:
        yield made


def test_it_needs_a_key_that_the_database_has_not() -> None:
    with pytest.raises(SettingsError, match="--encrypt-payloads needs --secrets-key"):
        Settings(encrypt_payloads=True)


@pytest.mark.parametrize(("first", "again"), [*itertools.product([True, False], repeat=2)])
async def test_repeats_are_known_whoever_seals(database: str, first: bool, again: bool) -> None:
    async with node(database, seals=again) as other, node(database, seals=first) as one:
        session = await opened(one)
        posts = {
            "request": [request(session, "1", BODY)],
            "batch": [request(session, "2", BODY), request(session, None, b'{"n":1}'), request(session, "3", b"[3]")],
        }
        for kind, post in posts.items():
            stream = post[0].stream
            accepted = await one.inbox.accept([replace(each, stream=stream) for each in post])
            repeat = [replace(each, key=RequestKey(IDS.uuid()), stream=StreamId(IDS.uuid())) for each in reversed(post)]
            joined = await other.inbox.accept(repeat)
            assert (joined.joined, joined.stream) == (True, accepted.stream), kind
            changed = [replace(repeat[-1], key=RequestKey(IDS.uuid()), body=BODY + b" "), *repeat[:-1]]
            with pytest.raises(DuplicateRequest):
                await other.inbox.accept(changed)


async def test_a_claim_brings_what_was_said(sealer: Store, database: str, hand: asyncpg.Connection) -> None:
    session = await opened(sealer)
    async with node(database, seals=False) as clear:
        for number, accepting in enumerate((sealer, clear)):
            await accepting.inbox.accept([request(session, str(number), BODY)])
    assert [claimed.body for claimed in await sealer.inbox.claim(session.ownership)] == [BODY, BODY]
    stored = [row["body"] for row in await hand.fetch("select body from pgmcp.requests order by position")]
    assert [body.startswith(SEALED) for body in stored] == [True, False]
    assert b"MARKER" not in stored[0]


async def test_rows_cannot_be_exchanged(sealer: Store, hand: asyncpg.Connection) -> None:
    session, stranger = await opened(sealer), await opened(sealer)
    for whose in (session, stranger):
        await sealer.inbox.accept([request(whose, "1", BODY)])
    await hand.execute("update pgmcp.requests r set body = o.body from pgmcp.requests o where o.id <> r.id")
    with pytest.raises(PgmcpError, match="cannot be opened"):
        await sealer.inbox.claim(session.ownership)


@pytest.mark.parametrize(
    "size", [0, 1, 1000, PAGE_BYTES - 35, PAGE_BYTES - 34, PAGE_BYTES - 33, PAGE_BYTES, 3 * PAGE_BYTES - 98, 3_500_000]
)
async def test_events_of_any_size_are_read_as_they_were(sealer: Store, hand: asyncpg.Connection, size: int) -> None:
    message = bytes(itertools.islice(itertools.cycle(b"MARKER"), size))
    session = await opened(sealer)
    await sealer.log.append(Entry(session.ownership, session.standalone, 1, message))
    assert not await hand.fetchval("select true from pgmcp.events where position('MARKER'::bytea in message) > 0")
    attached = await sealer.log.attach(session.session_id, request(session).principal, None)
    assert isinstance(attached, Attachment)
    cursor = Cursor(attached.stream, attached.sink_epoch, 0)
    (found,) = (await sealer.log.read(cursor)).events
    assert found.size == size
    read = found.message
    while len(read) < size:
        piece = await sealer.log.read_on(cursor, len(read))
        assert piece
        read += piece
    assert read == message


async def test_a_new_owner_inherits_what_was_sealed(sealer: Store, database: str, hand: asyncpg.Connection) -> None:
    session = await opened(sealer)
    await sealer.inbox.accept([request(session, "1", BODY)])
    (claimed,) = await sealer.inbox.claim(session.ownership)
    await sealer.inbox.accept([request(session, None, b'{"MARKER":1}', method=None)])
    assert claimed.stream is not None
    for seq, message in enumerate((ASKED, b'{"method":"notifications/message","x":"MARKER"}'), 1):
        await sealer.log.append(Entry(session.ownership, claimed.stream, seq, message))
    kept = JournalEntry("state", "key", b'"MARKER"')
    await sealer.inbox.write_journal(session.ownership, kept, 1)
    async with node(database, seals=False) as heir:
        await hand.execute("update pgmcp.sessions set owner = $1, epoch = epoch + 1", heir.node)
        left = await heir.takeovers.inherit(Ownership(session.key, session.ownership.epoch + 1))
    assert [inherited.body for inherited in left.requests] == [BODY]
    assert [heard.body for heard in left.heard] == [b'{"MARKER":1}']
    assert [message for _, message in left.said] == [ASKED]
    assert left.journal == (kept,)
    assert left.version == 1
    for table, column in (("requests", "body"), ("events", "message"), ("journal", "body")):
        for row in await hand.fetch(f"select {column} as it from pgmcp.{table}"):
            assert b"MARKER" not in row["it"]


async def test_a_replaced_key_opens_what_it_has_sealed(sealer: Store, database: str, hand: asyncpg.Connection) -> None:
    session = await opened(sealer)
    await sealer.inbox.accept([request(session, "1", BODY)])
    await hand.execute(
        "update pgmcp.secrets set created_at = created_at - interval '40 days' where purpose like 'payload%'"
    )
    async with node(database) as later:
        keys = await hand.fetch(
            "select purpose, count(*) as many from pgmcp.secrets where purpose like 'payload%' group by 1"
        )
        assert {row["purpose"]: row["many"] for row in keys} == {"payload": 2, "payload-mark": 1}
        await hand.execute(
            "update pgmcp.secrets set created_at = created_at - interval '1 hour' where purpose = 'payload'"
        )
        await later.payloads.load()
        place = place_of_body(request(session).key)
        assert later.payloads.seal(BODY, place)[2:6] > await hand.fetchval(
            "select substring(body from 3 for 4) from pgmcp.requests"
        )
        joined = await later.inbox.accept([request(session, "1", BODY)])
        assert joined.joined
    assert [claimed.body for claimed in await sealer.inbox.claim(session.ownership)] == [BODY]


async def test_no_node_seals_beside_one_that_cannot_read_it(sealer: Store, hand: asyncpg.Connection) -> None:
    old = NodeRecord(NodeId(IDS.uuid()), "old", "", "0", "0014")
    await join(sealer.database, old)
    await hand.execute("update pgmcp.nodes set schema_newest = '0014'")
    await hand.execute("update pgmcp.schema_range set needs = '0001'")  # as before the first contract step
    with pytest.raises(SchemaInUse, match="Node old is of an older build"):
        await no_older(sealer.database)
    assert await hand.fetchval("select needs from pgmcp.schema_range") == "0001"
    await hand.execute("update pgmcp.nodes set state = $1", NodeState.LEFT)
    await no_older(sealer.database)
    assert await hand.fetchval("select needs from pgmcp.schema_range") == "0019", "an older one does not join any more"


def test_what_a_new_owner_wants_is_told_as_sql_tells_it() -> None:
    said = [ASKED, json.dumps({"id": 1, "result": 2}).encode(), b'{"method":"notifications/progress"}', b"{}"]
    assert [wanted(message) for message in said] == [True, False, True, False]
