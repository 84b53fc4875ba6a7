"""The key rings: what one node sealed another opens, in the same place only, also while keys change and lie wrapped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pgmcp.errors import DatabaseUnavailable, PgmcpError, SettingsError
from pgmcp.settings import Settings
from pgmcp.store.encryption import key_rings
from pgmcp.store.encryption.key_rings import CONTEXTS, KEPT_SECONDS, RIPE_SECONDS, KeyRing, StateRing
from pgmcp.store.encryption.key_wrapping import KeyWrapping, wrapping_of
from pgmcp.store.retention import Retention
from pgmcp.store.statements import statement
from tests.harness.clock import FakeClock
from tests.harness.proxy import proxied
from tests.harness.stores import IDS, Store, store
from tests.harness.waiting import eventually

PLAIN, PLACE = b'{"token": "secret"}', b"session/1"
FIRST, SECOND = "first-secrets-key-of-32-characters", "second-secrets-key-of-32-characters"
CLEAR = KeyWrapping([])


def ring_of(node: Store, wrapping: KeyWrapping = CLEAR) -> KeyRing:
    return KeyRing(node.database, CONTEXTS, wrapping)


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    """The tests' own connection."""
    connection = await asyncpg.connect(database, timeout=10)
    yield connection
    await connection.close()


async def age(hand: asyncpg.Connection, seconds: float) -> None:
    """Make every key older, which is how database time passes for them."""
    await hand.execute("update pgmcp.secrets set created_at = created_at - make_interval(secs => $1)", seconds)


async def ids(hand: asyncpg.Connection) -> list[int]:
    return [row["id"] for row in await hand.fetch("select id from pgmcp.secrets order by id")]


async def test_nodes_share_their_keys(database: str, hand: asyncpg.Connection) -> None:
    """Also when all of a new cluster's nodes come at once: one of them makes the key, and it seals at once."""
    async with store(database) as one, store(database) as two:
        rings = [ring_of(node) for node in (one, two) * 3]
        await asyncio.gather(*(ring.load() for ring in rings))
        assert len(await ids(hand)) == 1
        for sealer in rings:
            for opener in rings:
                assert opener.open_known(sealer.seal(PLAIN, PLACE), PLACE) == PLAIN


@pytest.mark.parametrize("first", [True, False], ids=["first", "next"])
async def test_who_comes_while_another_node_makes_a_key_takes_that_one(
    database: str, hand: asyncpg.Connection, first: bool
) -> None:
    async with store(database) as node:
        ring = ring_of(node)
        if not first:
            await ring.load()
            await age(hand, node.database.settings.key_rotation + 1)
        before = await ids(hand)
        async with hand.transaction():
            made = statement("add_key", "pgmcp"), CONTEXTS, bytes(32), None, node.database.settings.key_rotation
            await hand.execute(*made)
            coming = asyncio.create_task(ring.load())
            waiting = (
                "select count(*) from pg_locks join pg_stat_activity using (pid) "
                "where not granted and datname = current_database() and query like '%add_key%'"
            )
            await eventually(lambda: hand.fetchval(waiting), "it waits for the other")
        await coming
        assert len(await ids(hand)) == len(before) + 1
        assert ring.key_ids == set(await ids(hand))


async def test_the_next_key_is_made_once_and_opens_everywhere_before_it_seals_anywhere(
    database: str, hand: asyncpg.Connection
) -> None:
    async with store(database) as node:
        node.database.clock = clock = FakeClock()
        rings = [ring_of(node) for _ in range(4)]
        for ring in rings:
            await ring.load()
        [first] = await ids(hand)
        await age(hand, node.database.settings.key_rotation + 1)
        await asyncio.gather(*(ring.load() for ring in rings[:3]))
        before, second = await ids(hand)
        assert before == first
        late = rings[3]  # it has not read the ring again
        for ring in rings:
            assert key_of(ring.seal(PLAIN, PLACE)) == first
        clock.jump(RIPE_SECONDS - 1)
        assert key_of(rings[0].seal(PLAIN, PLACE)) == first
        clock.jump(2)
        boxes = [ring.seal(PLAIN, PLACE) for ring in rings]
        assert [key_of(box) for box in boxes] == [second, second, second, first]
        for box in boxes:
            await late.learn(box)
            assert {ring.open_known(box, PLACE) for ring in rings} == {PLAIN}


def key_of(box: bytes) -> int:
    return int.from_bytes(box[:4], "big")


async def test_a_key_that_was_replaced_is_kept_for_longer_than_a_session_lives(
    database: str, hand: asyncpg.Connection
) -> None:
    async with store(database) as node:
        ring, settings = ring_of(node), node.database.settings
        await ring.load()
        await age(hand, settings.key_rotation + 1)
        await ring.load()
        old, new = await ids(hand)
        await age(hand, RIPE_SECONDS + settings.max_age + KEPT_SECONDS - 60)
        await ring.load()
        assert await ids(hand) == [old, new]
        await age(hand, 120)
        await ring.load()
        assert await ids(hand) == [new]


async def test_keys_of_a_build_without_generations_go_on(database: str, hand: asyncpg.Connection) -> None:
    await hand.execute("insert into pgmcp.secrets (purpose, key) values ('context', $1), ('context', $2)", *KEYS)
    async with store(database) as node:
        ring = ring_of(node)
        await ring.load()
        assert len(await ids(hand)) == 2
        await age(hand, node.database.settings.key_rotation + 1)
        await ring.load()
        assert await ids(hand) == [2, 3], "the first was replaced 30 days ago"
        assert ring.open_known(ring.seal(PLAIN, PLACE), PLACE) == PLAIN


KEYS = (bytes(32), bytes(31) + b"1")


async def test_an_unknown_key_is_looked_for_once_in_a_while(database: str, hand: asyncpg.Connection) -> None:
    async with store(database) as node:
        node.database.clock = clock = FakeClock()
        ring, loads = ring_of(node), 0
        await ring.load()
        load = ring.load

        async def counting(*, make: bool = True) -> None:
            nonlocal loads
            loads += 1
            await load(make=make)

        ring.load = counting  # type: ignore[method-assign]
        junk = [b"\xff\xff\xff" + bytes([number]) + bytes(40) for number in range(20)]
        await asyncio.gather(*(ring.learn(box) for box in junk))
        assert loads == 1
        clock.jump(key_rings.SETTLED_SECONDS)
        await ring.learn(junk[0])
        assert loads == 2


async def test_what_cannot_be_looked_up_is_no_refusal(database: str) -> None:
    async with proxied(database) as (proxy, way), store(way) as node:
        node.database.settings = node.database.settings.model_copy(update={"statement_timeout": 0.3})
        ring = ring_of(node)
        await ring.load()
        box = ring.seal(PLAIN, PLACE)
        proxy.refusing = True
        proxy.cut_all()
        outcomes = await asyncio.gather(*(ring.learn(b"\xff" * 44) for _ in range(20)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {DatabaseUnavailable}
        await ring.learn(box)
        assert ring.open_known(box, PLACE) == PLAIN


async def test_nothing_lies_in_clear_and_no_two_boxes_are_alike(database: str) -> None:
    async with store(database) as node:
        ring = ring_of(node)
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
        ring = ring_of(node)
        await ring.load()
        box = ring.seal(PLAIN, PLACE)
        flipped = [box[:place] + bytes([box[place] ^ 1]) + box[place + 1 :] for place in range(4, len(box))]
        messages = [await refused(ring, bad) for bad in [b"\xff" * 4 + box[4:], *flipped]]
        messages.append(await refused(ring, box, b"session/2"))
        assert not any("secret" in message for message in messages)


async def test_a_box_that_was_cut_short_is_refused(database: str) -> None:
    async with store(database) as node:
        ring = ring_of(node)
        await ring.load()
        box = ring.seal(PLAIN, PLACE)
        for length in range(len(box)):
            await refused(ring, box[:length])


# wrapping


async def stored(hand: asyncpg.Connection) -> list[tuple[int, bool]]:
    rows = await hand.fetch("select length(key) as length, wrapped_by is not null as wrapped from pgmcp.secrets")
    return [(row["length"], row["wrapped"]) for row in rows]


async def test_all_stored_keys_are_wrapped_also_those_that_lay_in_clear(
    database: str, hand: asyncpg.Connection
) -> None:
    async with store(database) as node:
        before, after = ring_of(node), ring_of(node, KeyWrapping([FIRST]))
        await before.load()
        states = StateRing(node.database, CLEAR, IDS)
        await states.load()
        box = before.seal(PLAIN, PLACE)
        assert await stored(hand) == [(32, False)] * 2
        await after.load()
        await StateRing(node.database, KeyWrapping([FIRST]), IDS).load()
        assert await stored(hand) == [(60, True)] * 2
        assert after.open_known(box, PLACE) == PLAIN
        with pytest.raises(SettingsError):
            await before.load()
        assert before.open_known(after.seal(PLAIN, PLACE), PLACE) == PLAIN, "it goes on with what it has"


async def test_a_secrets_key_is_changed_step_by_step(database: str) -> None:
    async with store(database) as node:
        old = ring_of(node, KeyWrapping([FIRST]))
        await old.load()
        box = old.seal(PLAIN, PLACE)
        both = ring_of(node, KeyWrapping([FIRST, SECOND]))
        await both.load()
        await old.load()
        turned = ring_of(node, KeyWrapping([SECOND, FIRST]))
        await turned.load()
        assert both.open_known(turned.seal(PLAIN, PLACE), PLACE) == PLAIN
        alone = ring_of(node, KeyWrapping([SECOND]))
        await alone.load()
        assert alone.open_known(box, PLACE) == PLAIN


async def planted(hand: asyncpg.Connection, purpose: str = CONTEXTS) -> int:
    """A key that somebody with rights on the table knows, as the newest of a ring."""
    return int(
        await hand.fetchval(
            "insert into pgmcp.secrets (purpose, key, generation, created_at) "
            "values ($1, $2, 1000, now() - interval '1 hour') returning id",
            purpose,
            bytes(32),
        )
    )


@pytest.mark.parametrize("running", [True, False])
async def test_a_key_that_was_planted_in_clear_neither_seals_nor_opens(
    database: str, hand: asyncpg.Connection, caplog: pytest.LogCaptureFixture, running: bool
) -> None:
    async with store(database) as node:
        ring = ring_of(node, KeyWrapping([FIRST]))
        await ring.load()
        before = ring.seal(PLAIN, PLACE)
        key_id = await planted(hand)
        if not running:
            ring = ring_of(node, KeyWrapping([FIRST]))
        for _ in range(2):
            await ring.load()
        sealed = ring.seal(PLAIN, PLACE)
        assert key_of(sealed) == key_of(before)
        forged = key_id.to_bytes(4, "big") + bytes(12) + AESGCM(bytes(32)).encrypt(bytes(12), PLAIN, PLACE)
        with pytest.raises(PgmcpError):
            await ring.open(forged, PLACE)
        assert ring.open_known(before, PLACE) == PLAIN
        assert await hand.fetchval("select wrapped_by is null from pgmcp.secrets where id = $1", key_id)
    said = [record.getMessage() for record in caplog.records if "lies in clear" in record.getMessage()]
    assert len(said) == 1, "once for each key"
    assert f"key {key_id} of ring {CONTEXTS}" in said[0]


async def test_a_running_node_takes_no_ring_that_was_replaced_in_clear(database: str, hand: asyncpg.Connection) -> None:
    async with store(database) as node:
        ring = ring_of(node, KeyWrapping([FIRST]))
        await ring.load()
        before = ring.seal(PLAIN, PLACE)
        await hand.execute("delete from pgmcp.secrets")
        await planted(hand)
        with pytest.raises(SettingsError, match="lies in clear"):
            await ring.load()
        assert ring.open_known(before, PLACE) == PLAIN


async def test_keys_in_clear_are_taken_up_all_or_none(
    database: str, hand: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when another node does it between this one's look and its own write."""
    await hand.execute("insert into pgmcp.secrets (purpose, key) values ('context', $1), ('context', $2)", *KEYS)
    async with store(database) as node:
        first, second = (ring_of(node, KeyWrapping([FIRST])) for _ in range(2))
        persist, others = node.database.persist, [second]

        async def late(name: str, *args: object, **more: Any) -> list[asyncpg.Record]:
            if name == "wrap_keys" and others:
                await others.pop().load()
            return await persist(name, *args, **more)

        monkeypatch.setattr(node.database, "persist", late)
        await first.load()
        assert set(await stored(hand)) == {(60, True)}
        assert first.open_known(second.seal(PLAIN, PLACE), PLACE) == PLAIN
        monkeypatch.undo()
        await first.load()
        assert first.open_known(second.seal(PLAIN, PLACE), PLACE) == PLAIN


async def test_a_node_without_the_secrets_key_adds_nothing_to_a_wrapped_ring(
    database: str, hand: asyncpg.Connection
) -> None:
    async with store(database) as node:
        await ring_of(node, KeyWrapping([FIRST])).load()
        await age(hand, node.database.settings.key_rotation + 1)
        with pytest.raises(SettingsError):
            await ring_of(node).load()
        assert await stored(hand) == [(60, True)]


@pytest.mark.parametrize("secrets_key", [[], [SECOND]], ids=["none", "another"])
async def test_a_key_that_does_not_fit_is_said_clearly(database: str, secrets_key: list[str]) -> None:
    async with store(database) as node:
        await ring_of(node, KeyWrapping([FIRST])).load()
        with pytest.raises(SettingsError) as refusal:
            await ring_of(node, KeyWrapping(secrets_key)).load()
    said = str(refusal.value)
    assert "--secrets-key" in said
    assert "wrapped with the secrets key" in said
    assert not any(secret in said for secret in (FIRST, SECOND))


async def test_a_wrapped_key_fits_its_purpose_only(database: str, hand: asyncpg.Connection) -> None:
    async with store(database) as node:
        await ring_of(node, KeyWrapping([FIRST])).load()
        await hand.execute("update pgmcp.secrets set purpose = 'request-state'")
        with pytest.raises(SettingsError):
            await StateRing(node.database, KeyWrapping([FIRST]), IDS).load()


def test_where_the_secrets_key_comes_from(tmp_path: Path, subtests: pytest.Subtests) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{FIRST}\n{SECOND}\n")
    cases: dict[str, Callable[[], Settings]] = {
        "option": lambda: Settings(secrets_key=f"{FIRST}, {SECOND}"),
        "file": lambda: Settings(secrets_key_file=str(file)),
    }
    wrapped = KeyWrapping([FIRST]).wrap(bytes(32), CONTEXTS)
    for name, settings in cases.items():
        with subtests.test(name):
            assert wrapping_of(settings()).unwrap(wrapped, CONTEXTS) == bytes(32)
    (tmp_path / "empty").touch()
    for wrong in ({"secrets_key": "short"}, {"secrets_key_file": str(tmp_path / "none")},
                  {"secrets_key_file": str(tmp_path / "empty")},
                  {"secrets_key": FIRST, "secrets_key_file": str(file)}):  # fmt: skip
        with subtests.test(str(list(wrong))), pytest.raises(SettingsError):
            wrapping_of(Settings(**wrong))


# what was used


async def test_a_state_is_spent_once_on_all_nodes(database: str) -> None:
    async with store(database) as one, store(database) as two:
        rings = [StateRing(node.database, CLEAR, IDS) for node in (one, two)]
        await rings[0].load()
        for _ in range(20):
            box = rings[0].seal(PLAIN, PLACE)
            spent = await asyncio.gather(*(ring.spend(box, 600) for ring in rings * 3))
            assert sum(spent) == 1
        assert await rings[1].spend(rings[0].seal(PLAIN, PLACE), 600)


async def test_what_was_spent_is_forgotten_when_it_could_not_be_used_any_more(
    database: str, hand: asyncpg.Connection
) -> None:
    async with store(database) as node:
        ring = StateRing(node.database, CLEAR, IDS)
        await ring.load()
        old, young = ring.seal(PLAIN, PLACE), ring.seal(PLAIN, PLACE)
        assert await ring.spend(old, -1)
        assert await ring.spend(young, 600)
        await Retention(node.database, IDS).prune()
        assert [row["state"] for row in await hand.fetch("select state from pgmcp.spent_states")] == [young[:16]]
