"""What an error of the database says, without the values of rows and statements.

PostgreSQL quotes them in details, and of some classes in the message itself; asyncpg quotes arguments that it cannot
encode. Such texts end in logs and answers, so what may quote is named by its kind, SQLSTATE and constraint only.
"""

from __future__ import annotations

import asyncpg

_SPEAKING = ("08", "0A", "25", "28", "3D", "3F", "40", "42", "53", "54", "55", "57", "58", "XX")
"""Classes whose message names servers, roles, tables and limits, and nothing that came from clients."""


class WillNotDo(ConnectionError):
    """The server answers, and cannot be worked with until somebody changes something."""


REFUSALS = (
    WillNotDo,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)
"""What a server says that will say it again; anything else may pass by itself."""


def error_text(error: BaseException) -> str:
    """Why the database did not do what it was asked."""
    kind = type(error).__name__
    if isinstance(error, ValueError):  # asyncpg's own, of an argument that it cannot encode
        return kind
    if isinstance(error, WillNotDo):
        return str(error)
    if not isinstance(error, asyncpg.PostgresError):
        return f"{kind}: {error}" if str(error) else kind
    state = str(error.sqlstate or "")
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return f"{error.args[0] if error.args else kind}: `pgmcp db grants` prints what the role needs"
    if state.startswith(_SPEAKING):
        return f"{kind}: {error.args[0] if error.args else state}"
    constraint = getattr(error, "constraint_name", None)
    return f"{kind}, SQLSTATE {state}{f', {constraint}' if constraint else ''}"
