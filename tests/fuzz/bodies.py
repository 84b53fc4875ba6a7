"""Bodies for messages of every kind."""

from __future__ import annotations

import json


def dumps(value: object) -> bytes:
    """JSON with everything that Python's encoder lets pass: lone surrogates as escapes, NaN, huge numbers."""
    return json.dumps(value).encode()
