"""Tokens that expire while an exchange is open."""

from __future__ import annotations

from pgmcp.clock import Clock
from pgmcp.web.json_rpc import Refusal

GRACE_SECONDS = 5.0
"""Seconds for which a token that has expired is still good for what it has opened."""

TEXT = "The access token has expired; get another one and send the same request again"


class TokenExpiry:
    """The end of the token that opened an exchange.

    Args:
        expires_at: in seconds since 1970; infinite for one that does not.
    """

    def __init__(self, clock: Clock, expires_at: float) -> None:
        self._clock, self._at = clock, clock.moment(expires_at + GRACE_SECONDS)

    @property
    def passed(self) -> bool:
        """Whether the client has to come back with another one."""
        return self._clock.boottime() >= self._at

    def within(self, seconds: float) -> float:
        """The seconds until then, if those are fewer."""
        return max(0.0, min(seconds, self._at - self._clock.boottime()))


def expired() -> Refusal:
    """The answer where nothing was said yet: clients get a new token and send the same again."""
    challenge = f'Bearer error="invalid_token", error_description="{TEXT}"'
    return Refusal(401, TEXT, headers={"www-authenticate": challenge})
