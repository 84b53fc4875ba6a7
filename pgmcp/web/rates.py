"""Rates: how much one caller may ask of this node in a second.

A caller (a principal or, where nobody is known, an address) has a bucket for each kind of thing: it fills at the rate,
up to ``BURST_SECONDS``' worth, and what is asked takes one out.

Invariants:
- Whoever is refused is so before anything of the body is parsed or stored, and is told when there is room again.
- Not more than ``CALLERS`` buckets are kept; those go first that were used longest ago, for they are full again.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict

from pgmcp.clock import Clock
from pgmcp.settings import Settings
from pgmcp.types import ANONYMOUS
from pgmcp.web.admission import Caller
from pgmcp.web.http_exchange import HttpExchange, network
from pgmcp.web.json_rpc import Refusal

logger = logging.getLogger(__name__)

FORWARDED = "x-forwarded-for"

BURST_SECONDS = 10.0
"""Seconds' worth that may come at once."""

CALLERS = 10_000
"""Callers that a node remembers."""


class Bucket:
    """One kind of thing, for every caller.

    Args:
        rate: how many a second; 0 for any number.
    """

    def __init__(self, rate: float, clock: Clock) -> None:
        self._rate, self._most, self._clock = rate, max(1.0, rate * BURST_SECONDS), clock
        self._left: OrderedDict[Caller, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._left)

    def take(self, caller: Caller) -> float:
        """Take one out; the seconds until there is one again, if there is none: 0 if it was taken."""
        if not self._rate:
            return 0.0
        now = self._clock.boottime()
        left, since = self._left.pop(caller, (self._most, now))
        left = min(self._most, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._left[caller] = (left if wait else left - 1), now
        if len(self._left) > CALLERS:
            self._left.popitem(last=False)
        return wait


class Rates:
    """The rates of one node."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings, self._told = settings, False
        self._posts, self._openings = Bucket(settings.rate, clock), Bucket(settings.initialize_rate, clock)

    def post(self, caller: Caller) -> None:
        """Count a POST of any kind.

        Raises:
            Refusal: 429, there are too many.
        """
        if wait := self._posts.take(caller):
            raise _refusal(f"You may send {self._settings.rate:g} messages a second to a node", wait)

    def opening(self, exchange: HttpExchange) -> None:
        """Count a session that a caller wants to open.

        Raises:
            Refusal: 429, there are too many.
        """
        self._tell_of_proxy(exchange)
        if wait := self._openings.take(exchange.caller):
            raise _refusal(f"You may open {self._settings.initialize_rate:g} sessions a second at a node", wait)

    def _tell_of_proxy(self, exchange: HttpExchange) -> None:
        """Tell the operator, once, that callers look like one because their proxy is not believed."""
        said, client = exchange.header(FORWARDED), exchange.request.client
        if self._told or not said or client is None or exchange.principal != ANONYMOUS:
            return
        peer = network(client.host)
        if peer not in {network(each.strip()) for each in said.split(",")}:
            self._told = True
            logger.warning(
                "%s says for whom it asks (X-Forwarded-For) and is not in --forwarded-allow-ips: whoever comes through "
                "it is one caller, with one caller's share of sessions",
                peer if peer[:1].isdigit() else "a proxy",
            )


def _refusal(text: str, wait: float) -> Refusal:
    return Refusal(429, f"{text}; wait before you try again.", headers={"retry-after": str(math.ceil(wait))})
