"""What a body contains is counted as a parser would, wherever it is cut; and what passes costs a parser little."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgmcp.protocol import PARSE_ERROR
from pgmcp.web.json_limits import Count, JsonLimits
from pgmcp.web.json_rpc import Refusal

texts = st.text('\\"{[}]:,0a\u00e9\n', max_size=12)
anything = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def counted(value: object) -> tuple[int, int, int]:
    """Brackets, colons and commas; strings; levels."""
    if isinstance(value, str):
        return 0, 1, 0
    if not isinstance(value, (list, dict)):
        return 0, 0, 0
    inner = [counted(each) for each in (value.values() if isinstance(value, dict) else value)]
    colons, keys = (len(value), len(value)) if isinstance(value, dict) else (0, 0)
    marks = 2 + colons + max(0, len(value) - 1) + sum(each[0] for each in inner)
    return marks, keys + sum(each[1] for each in inner), 1 + max((each[2] for each in inner), default=0)


def passes(body: bytes, elements: int, depth: int) -> bool:
    try:
        JsonLimits(elements, depth).check(body)
    except Refusal:
        return False
    return True


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(value=anything, ascii_only=st.booleans(), piece=st.integers(1, 40))
@example(value=["\\", '"', '\\"', "\\\\"], ascii_only=True, piece=1)
@example(value={'a\\"': [[["]"]]]}, ascii_only=True, piece=2)
def test_counts(value: object, ascii_only: bool, piece: int) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    marks, _, depth = counted(value)
    if marks:
        count = Count(JsonLimits(10**6, 10**6))
        for start in range(0, len(body), piece):
            count.add(body[start : start + piece])
        assert count.marks == marks
        assert count.level == 0
        assert passes(body, max(marks, 100), depth)
        assert not passes(body, max(marks, 100), depth - 1)
        assert marks < 2 or not passes(body, marks - 1, depth)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" + b",".join([b"[" * 90 + b"]" * 90] * 22_000) + b"]", id="lists"),
        pytest.param(b"{" + b",".join(b'"%d":{}' % n for n in range(20_000)) + b"}", id="objects"),
        pytest.param(b"[" + b'"",' * 60_000 + b'""]', id="strings"),
        pytest.param(b'{"x":"\\\\","y":[' + b"[]," * 60_000 + b"[]]}", id="behind a backslash"),
        pytest.param(b'{"x":"\\\\\\"","y":[' + b"[]," * 60_000 + b"[]]}", id="behind a quote"),
        pytest.param(b"[" + b",".join([b"9" * 4000] * 1000) + b"]", id="digits"),
        pytest.param(b"[" * 101 + b"]" * 101, id="levels"),
        pytest.param(json.dumps([[]] * 60_000).encode("utf-16"), id="UTF-16"),
        pytest.param(json.dumps([[]] * 60_000).encode("utf-16-le"), id="UTF-16 without a mark"),
        pytest.param(json.dumps([[]] * 60_000).encode("utf-32"), id="UTF-32"),
    ],
)
async def test_bombs(body: bytes) -> None:
    assert not passes(body, 50_000, 100)
    with pytest.raises(Refusal) as refused:
        await JsonLimits(50_000, 100).check_large(body)
    assert (refused.value.status, refused.value.code) == (400, PARSE_ERROR)


@pytest.mark.parametrize(
    "text",
    ["a,b;{c}:[d]\n" * 300_000, '"' * 2_000_000, "\\" * 2_000_000, "1234567890," * 350_000, "{[" * 2_000_000],
    ids=["table", "quotes", "backslashes", "digits", "brackets"],
)
async def test_a_large_text_passes_whatever_it_says(text: str) -> None:
    body = json.dumps({"jsonrpc": "2.0", "method": "x", "params": {"text": text}}).encode()
    await JsonLimits(50_000, 100).check_large(body)
    assert passes(body, 50_000, 100)
