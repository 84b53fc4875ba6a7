"""The key ring: what one node sealed another opens, in the same place only."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from pgmcp.errors import PgmcpError
from pgmcp.store.secrets import KeyRing
from tests.harness.stores import store

PLAIN, PLACE = b'{"token": "secret"}', b"session/1"


async def test_nodes_share_their_keys(database: str) -> None:
    """Also when all of a new cluster's nodes come at once, and more than one of them makes a key."""
    async with store(database) as one, store(database) as two:
        rings = [KeyRing(node.database) for node in (one, two) * 3]
        await asyncio.gather(*(ring.load() for ring in rings))
        for sealer in rings:
            for opener in rings:
                assert await opener.open(sealer.seal(PLAIN, PLACE), PLACE) == PLAIN


async def test_a_newer_key_seals_and_older_ones_still_open(database: str) -> None:
    hand = await asyncpg.connect(database, timeout=10)
    try:
        async with store(database) as node:
            early, late = KeyRing(node.database), KeyRing(node.database)
            await early.load()
            old = early.seal(PLAIN, PLACE)
            await hand.execute("insert into pgmcp.secrets (purpose, key) values ('context', $1)", bytes(32))
            await late.load()
            new = late.seal(PLAIN, PLACE)
            assert new[:4] > old[:4]
            assert await late.open(old, PLACE) == PLAIN
            assert await early.open(new, PLACE) == PLAIN
    finally:
        await hand.close()


async def test_nothing_lies_in_clear_and_no_two_boxes_are_alike(database: str) -> None:
    async with store(database) as node:
        ring = KeyRing(node.database)
        await ring.load()
        boxes = {ring.seal(PLAIN, PLACE) for _ in range(50)}
        assert len(boxes) == 50
        assert not any(b"secret" in box or b"token" in box for box in boxes)


async def refused(ring: KeyRing, box: bytes, place: bytes = PLACE) -> str:
    with pytest.raises(PgmcpError) as refusal:
        await ring.open(box, place)
    return str(refusal.value)


async def test_another_place_a_flipped_bit_and_an_unknown_key_are_refused(database: str) -> None:
    async with store(database) as node:
        ring = KeyRing(node.database)
        await ring.load()
        box = ring.seal(PLAIN, PLACE)
        flipped = [box[:place] + bytes([box[place] ^ 1]) + box[place + 1 :] for place in range(4, len(box))]
        messages = [await refused(ring, bad) for bad in [b"\xff" * 4 + box[4:], *flipped]]
        messages.append(await refused(ring, box, b"session/2"))
        assert not any("secret" in message for message in messages)


async def test_a_box_that_was_cut_short_is_refused(database: str) -> None:
    async with store(database) as node:
        ring = KeyRing(node.database)
        await ring.load()
        box = ring.seal(PLAIN, PLACE)
        for length in range(len(box)):
            await refused(ring, box[:length])
