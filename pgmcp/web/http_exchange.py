"""One HTTP exchange as it arrives: the request, and its connection."""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Literal

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from starlette.requests import Request
from starlette.responses import Response

from pgmcp.errors import NodeFull
from pgmcp.protocol import INTERNAL_ERROR, SESSION_ID_HEADER
from pgmcp.types import ANONYMOUS, Principal
from pgmcp.web.admission import Caller
from pgmcp.web.bodies import Body
from pgmcp.web.connection import Connection
from pgmcp.web.json_rpc import Refusal

OWNER = "pgmcp_node"
"""The affinity cookie: the name of the session's owner."""

LONGEST_ADDRESS_CHARACTERS = 100
"""Characters of an address that is none: what a proxy passes on."""

_PORTED = re.compile(r"(?:\[(.*)\]|([\d.]+)):\d+")


@dataclass(frozen=True, slots=True)
class HttpExchange:
    """One exchange; identity, if any, was put into the request's scope before it came here."""

    request: Request
    connection: Connection
    arrived: float = math.inf
    """When the request had come, by the node's clock; infinite where nobody asks."""
    bind_to: Literal["client,subject", "subject"] = "client,subject"
    """What of a token says whose a session is."""

    def header(self, name: str) -> str:
        """A header's value without blanks around it (not every HTTP parser strips them); empty when it is missing."""
        return self.request.headers.get(name, "").strip()

    @property
    def session_id(self) -> str:
        """The session that the exchange belongs to.

        Raises:
            Refusal: 400 without one; 404 for what can be nobody's id.
        """
        session_id = self.header(SESSION_ID_HEADER)
        if not session_id:
            raise Refusal(400, "Bad Request: Missing session ID")
        if not all("!" <= char <= "~" for char in session_id):
            raise Refusal(404, "Session not found")
        return session_id

    @property
    def principal(self) -> Principal:
        """Who is asking, as the SDK's authentication found out.

        Where only the subject counts, the client of a token that has one is the empty name.
        """
        user = self.request.scope.get("user")
        if not isinstance(user, AuthenticatedUser):
            return ANONYMOUS
        found = authorization_context(user)
        client = "" if self.bind_to == "subject" and found["subject"] else found["client_id"]
        return Principal(client, found["issuer"], found["subject"])

    @property
    def expires_at(self) -> float:
        """When its token expires, in seconds since 1970; infinite where none was asked for, or it never does."""
        user = self.request.scope.get("user")
        return (isinstance(user, AuthenticatedUser) and user.access_token.expires_at) or math.inf

    @property
    def caller(self) -> Caller:
        """The caller, session or not: the principal or, where nobody is known, the address."""
        principal, client = self.principal, self.request.client
        return Caller(principal, network(client.host) if principal == ANONYMOUS and client is not None else "")

    async def read(self, body: Body, limit: int, seconds: float) -> None:
        """Read the body.

        Args:
            body: counts what comes, and gets the text.
            limit: bytes that it may have.
            seconds: how long it may take to arrive.

        Raises:
            Refusal: 413, as soon as it is known to be larger; 408, it did not arrive in time; 503, there is no room for
                the rest of it.
            NodeFull: there is no room for what it was announced to have; nothing of it was read.
        """
        large = f"The body has more than {limit} bytes"
        declared = self.header("content-length")
        if declared.isascii() and declared.isdigit():
            if len(declared) > 18 or int(declared) > limit:
                raise Refusal(413, large)
            body.expect(int(declared))
        chunks: list[bytes] = []
        length = 0
        try:
            async with asyncio.timeout(seconds):
                async for chunk in self.request.stream():
                    length += len(chunk)
                    if length > limit:
                        raise Refusal(413, large)
                    body.grow(len(chunk))
                    chunks.append(chunk)
        except NodeFull as error:  # what is left of it is read and dropped, or its sender would never see the answer
            raise Refusal(503, str(error), INTERNAL_ERROR, {"retry-after": "1"}) from None
        except TimeoutError:
            late = f"The body did not arrive within {seconds:g} s; nothing was stored, send it again"
            raise Refusal(408, late, headers=self._closing) from None
        body.text = b"".join(chunks)

    @property
    def _closing(self) -> dict[str, str]:
        """What makes an HTTP/1.1 server close a connection, instead of waiting for the rest of the body."""
        return {"connection": "close"} if self.request.scope["http_version"].startswith("1") else {}

    def owner_cookie(self, owner: str, *, opened: bool) -> dict[str, str]:
        """The header that tells the client who owns its session, when it should hear that.

        A client that keeps no cookies is told once; one that does, again when the owner is another one.

        Args:
            owner: the owner's name, as this node last knew it.
            opened: whether the session has just been opened.
        """
        known = self.request.cookies.get(OWNER)
        if known == owner or (known is None and not opened):
            return {}
        return {"set-cookie": f"{OWNER}={owner}; Path=/; HttpOnly; SameSite=Lax"}

    async def respond(self, status: int, headers: dict[str, str] | None = None) -> None:
        """Answer without a body and without a content type."""
        await self.send_response(Response(status_code=status, headers=headers))

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal."""
        await self.send_response(Response(refusal.body, refusal.status, refusal.headers, "application/json"))

    async def send_response(self, response: Response) -> None:
        """Answer with a whole response."""
        await response(self.request.scope, self.connection.receive, self.connection.send)


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """What stands for a client's address: a client has all of an IPv6 /64, and would be another one with each call.

    Args:
        address: as the HTTP server or a proxy gives it, perhaps with a port.
    """
    ported = _PORTED.fullmatch(address)
    try:
        found = ip_address((ported[1] or ported[2]) if ported else address.strip("[]").partition("%")[0])
    except ValueError:
        return address.replace("\0", "")[:LONGEST_ADDRESS_CHARACTERS]
    if isinstance(found, IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ip_network((found, 64), strict=False))
