"""Wake-ups by a neighbour in the database: whatever it says, on whichever channel, harms nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgmcp.store.notifier import channel
from tests.fuzz.conftest import Target
from tests.fuzz.test_fuzz_messages import odd

numbers = st.integers(0, 2**70).map(str) | st.sampled_from(["1", "2", "3", "9" * 500, "-1", "1.1", ""])
words = st.sampled_from(["*", "o", "p", "probe:", "probe:x", "", "i", "e", "h."]) | st.one_of(
    st.builds("{}{}".format, st.sampled_from("ieh"), numbers),
    st.builds("h{}.{}".format, numbers, numbers),
    st.builds("{}{}".format, st.sampled_from("st"), st.uuids().map(lambda drawn: drawn.hex)),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)


@odd
@given(said=st.lists(st.tuples(st.booleans(), st.lists(words, max_size=20).map(",".join)), min_size=1, max_size=10))
def test_wakeups(watched: Target, said: list[tuple[bool, str]]) -> None:
    """The session that the test has goes on, with the same actor."""
    node = watched.node.incarnation
    actors = watched.node.actors
    for to_all, payload in said:
        where = channel("pgmcp", None if to_all else node.node_id)
        watched.run(watched.tables.rows("select pg_notify($1, $2)", where, payload[:7000]))
    watched.serves()
    assert watched.node.incarnation is node
    assert not watched.node.node.faults.counts
    assert all(watched.node.actors[key] is actor for key, actor in actors.items())
