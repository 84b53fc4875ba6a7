"""Who is asking: found out where an exchange arrives, known where it is handled, and never lying about in clear."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
from typing import Any

import asyncpg
import httpx
import pytest
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer
from pydantic import Field

from pgmcp.store.notifier import channel
from tests.harness.clients import RawExchange, RawSession
from tests.harness.cluster import Tables, cluster, tables_of
from tests.harness.waiting import eventually

edges = pytest.mark.parametrize("edge", [0, 1])
SECRET = "correct-horse-battery-staple"
HEADER = "x-secret-header-value"


class Badge(AccessToken):
    """A token with fields of its own."""

    department: str
    levels: dict[str, int] = Field(default_factory=dict)


class Verifier:
    """Knows tokens of the form ``who.scope.SECRET.number``."""

    async def verify_token(self, token: str) -> AccessToken | None:
        who, scope, secret, number = (token.split(".") + [""] * 4)[:4]
        if secret != SECRET:
            return None
        return Badge(
            token=token,
            client_id=f"client-{who}",
            scopes=scope.split("+"),
            subject=who,
            claims={"iss": "https://issuer.example", "number": number},
            department=f"department of {who}",
            levels={"a": len(who)},
        )


def token(who: str = "ada", scope: str = "use", number: object = 0) -> str:
    return f"{who}.{scope}.{SECRET}.{number}"


def bearer(*args: Any, **kwargs: Any) -> dict[str, str]:
    return {"authorization": f"Bearer {token(*args, **kwargs)}"}


def server() -> MCPServer:
    server = MCPServer(
        "private",
        token_verifier=Verifier(),
        auth=AuthSettings.model_validate(
            {
                "issuer_url": "https://issuer.example",
                "resource_server_url": "https://mcp.example/mcp",
                "required_scopes": ["use"],
                "validate_token_resource": False,
            }
        ),
    )

    @server.tool()
    async def who(ctx: Context) -> str:
        """Tell what the server knows of this very request."""
        await asyncio.sleep(0)
        found, request = get_access_token(), ctx.request_context.request
        assert found is not None
        assert request is not None
        assert isinstance(request.user.access_token, type(found))
        return json.dumps(
            {
                "type": type(found).__name__,
                "token": found.model_dump(),
                "headers": dict(request.headers),
                "method": request.method,
                "path": request.url.path,
                "query": dict(request.query_params),
                "scopes": list(request.auth.scopes),
                "client": request.client.host,
            }
        )

    @server.tool()
    async def fail() -> str:
        """Crash with the caller's token on the stack."""
        message = "no"
        raise RuntimeError(message)

    @server.tool()
    async def wait() -> str:
        """Work until somebody cancels."""
        await asyncio.Event().wait()
        return ""

    return server


async def raw(base: str, method: str, headers: dict[str, str], body: dict[str, Any] | None = None) -> httpx.Response:
    fixed = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
    async with httpx.AsyncClient(trust_env=False, verify=False, timeout=10) as http:
        return await http.request(method, f"{base}/mcp", headers={**fixed, **headers}, json=body)


async def settled(tables: Tables) -> dict[str, int]:
    """The row counts, when the owner has taken everything."""
    waiting = "select count(*) from pgmcp.requests where claimed_epoch is null"

    async def taken() -> bool:
        return bool(await tables.value(waiting) == 0)

    await eventually(taken, "everything is claimed")
    return await tables.counts()


PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


STRANGERS = [
    ({}, 401, "invalid_token"),
    ({"authorization": "Bearer wrong"}, 401, "invalid_token"),
    ({"authorization": "Basic YTpi"}, 401, "invalid_token"),
    (bearer(scope="look"), 403, "insufficient_scope"),
]


async def test_who_may_not_is_told_so_on_every_node(database: str, subtests: pytest.Subtests) -> None:
    metadata = 'resource_metadata="https://mcp.example/.well-known/oauth-protected-resource/mcp"'
    async with (
        cluster(database, server, 2) as nodes,
        tables_of(database) as tables,
        RawSession(headers=bearer()) as session,
    ):
        await session.open(nodes[0].url)
        await session.call(nodes[0].url, "ping")
        before = await settled(tables)
        known = {"mcp-session-id": str(session.session_id)}
        tries = itertools.product(STRANGERS, ("POST", "GET", "DELETE"), ({}, known, {"mcp-session-id": "x"}), nodes)
        for (headers, status, error), method, session_id, node in tries:
            with subtests.test(method, headers=headers, session_id=session_id):
                answer = await raw(node.url, method, {**headers, **session_id}, PING if method == "POST" else None)
                assert answer.status_code == status
                challenge = answer.headers["www-authenticate"]
                assert challenge.startswith("Bearer ")
                assert f'error="{error}"' in challenge
                assert metadata in challenge
        assert await tables.counts() == before


async def test_every_node_serves_the_resource_metadata(database: str) -> None:
    async with cluster(database, server, 2) as nodes, httpx.AsyncClient(trust_env=False, verify=False) as http:
        for node in nodes:
            answer = await http.get(f"{node.url}/.well-known/oauth-protected-resource/mcp")
            assert answer.status_code == 200
            assert answer.json()["resource"] == "https://mcp.example/mcp"
            assert answer.json()["authorization_servers"] == ["https://issuer.example"]
            assert answer.json()["scopes_supported"] == ["use"]


def seen(answer: RawExchange | httpx.Response) -> tuple[int, bytes, list[tuple[str, str]]]:
    """All that a client can see of an answer, but the time of day."""
    status = answer.status if isinstance(answer, RawExchange) else answer.status_code
    body = answer.body if isinstance(answer, RawExchange) else answer.content
    return status, body, sorted((k, v) for k, v in answer.headers.multi_items() if k != "date")


@edges
async def test_a_stranger_gets_what_an_unknown_session_gets(database: str, edge: int) -> None:
    async with (
        cluster(database, server, 2) as nodes,
        tables_of(database) as tables,
        RawSession(headers=bearer()) as session,
        RawSession(headers=bearer("eve")) as eve,
    ):
        await session.open(nodes[0].url)
        standalone = await session.get(nodes[edge].url)
        running = await session.request(nodes[edge].url, "tools/call", {"name": "wait", "arguments": {}}, request_id=5)
        primed = (await running.event()).id
        before = await settled(tables)

        async def try_all(session_id: str | None) -> list[tuple[int, bytes, list[tuple[str, str]]]]:
            eve.session_id = session_id
            call = {"name": "who", "arguments": {}}
            init = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "e", "version": "1"}}
            return [
                seen(await eve.request(nodes[edge].url, "ping", request_id=1)),
                seen(await eve.request(nodes[edge].url, "tools/call", call, request_id=5)),
                seen(await eve.request(nodes[edge].url, "initialize", init, request_id=1)),
                seen(await eve.notify(nodes[edge].url, "notifications/cancelled", {"requestId": 5})),
                seen(await eve.post(nodes[edge].url, {"jsonrpc": "2.0", "id": 1, "result": {}})),
                seen(await eve.post(nodes[edge].url, [PING])),
                seen(await eve.get(nodes[edge].url)),
                seen(await eve.get(nodes[edge].url, primed)),
                seen(await eve.get(nodes[edge].url, "0" * 32 + ".0")),
                seen(await eve.delete(nodes[edge].url)),
            ]

        foreign = await try_all(session.session_id)
        unknown = await try_all("n1-" + "0" * 32)
        assert foreign == unknown
        assert {status for status, _, _ in foreign} == {404}
        assert await tables.counts() == before
        # nothing happened to the session: its streams are carried, its call runs
        assert "result" in await session.call(nodes[edge].url, "ping")
        assert (await session.notify(nodes[0].url, "notifications/cancelled", {"requestId": 5})).status == 202
        assert (await running.response(5))["error"]["code"] == -32800
        assert standalone.error is None
        assert standalone.messages == []


@edges
async def test_the_tool_sees_the_request_that_called_it(database: str, edge: int) -> None:
    async with cluster(database, server, 2) as nodes, RawSession(headers=bearer()) as session:
        await session.open(nodes[0].url)

        async def ask(number: int) -> dict[str, Any]:
            exchange = await session.post(
                nodes[edge].url,
                {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": "who", "arguments": {}}},
                headers={**bearer(number=number), "x-number": str(number)},
            )
            answer = await exchange.response(number)
            return dict(json.loads(answer["result"]["content"][0]["text"]))

        for number, told in enumerate(await asyncio.gather(*(ask(number) for number in range(1, 31))), 1):
            assert told["type"] == "Badge"
            assert told["token"]["token"] == token(number=number)
            assert told["token"]["claims"] == {"iss": "https://issuer.example", "number": str(number)}
            assert told["token"]["department"] == "department of ada"
            assert told["token"]["levels"] == {"a": 3}
            assert told["headers"]["x-number"] == str(number)
            assert told["headers"]["authorization"] == f"Bearer {token(number=number)}"
            assert told["headers"]["host"] == nodes[edge].url.removeprefix("http://")
            assert told["headers"]["mcp-session-id"] == session.session_id
            assert (told["method"], told["path"], told["scopes"]) == ("POST", "/mcp", ["use"])
            assert told["client"] == "127.0.0.1"


@edges
async def test_the_query_reaches_the_tool(database: str, edge: int) -> None:
    async with cluster(database, server, 2) as nodes, RawSession(headers=bearer()) as session:
        await session.open(nodes[0].url)
        session.path = "/mcp?tenant=a%20b&x=1"
        told = json.loads((await session.call_tool(nodes[edge].url, "who"))["content"][0]["text"])
        assert told["query"] == {"tenant": "a b", "x": "1"}
        assert told["path"] == "/mcp"


async def test_nothing_secret_lies_about(database: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    heard: list[str] = []
    async with (
        cluster(database, server, 2) as nodes,
        tables_of(database) as tables,
        RawSession(headers={**bearer(), "x-secret": HEADER, "cookie": f"c={HEADER}"}) as session,
    ):
        spy = await asyncpg.connect(database)
        for node in (None, *(node.incarnation.node_id for node in nodes)):
            await spy.add_listener(channel("pgmcp", node), lambda _c, _p, _n, payload: heard.append(str(payload)))
        await session.open(nodes[0].url, nodes[1].url)
        standalone = await session.get(nodes[1].url)
        waiting = await session.request(nodes[1].url, "tools/call", {"name": "wait", "arguments": {}}, request_id="w")
        await session.call_tool(nodes[1].url, "who")
        await session.call(nodes[1].url, "tools/call", {"name": "fail", "arguments": {}})
        await session.call(nodes[0].url, "tools/call", {"name": "who", "arguments": {}, "_meta": {"progressToken": 1}})
        lost = await session.get(nodes[0].url)
        dump = await tables.dump()
        # what the server itself says (the tool "who") is content: it lies in the events, which are not looked at
        for place, values in dump.items():
            for secret in (SECRET, HEADER):
                hits = [value for value in values if secret.encode() in value]
                assert not hits or place == "events.message", place
        assert any(values for place, values in dump.items() if place == "requests.context")
        await session.notify(nodes[1].url, "notifications/cancelled", {"requestId": "w"})
        await waiting.rest()
        await session.delete(nodes[1].url)
        await standalone.rest()
        await lost.rest()
        await eventually(lambda: any(payload.startswith("e") for payload in heard), "the end was announced")
        await spy.close()
        session_id = str(session.session_id)
    words = [word for payload in heard for word in payload.split(",")]
    assert words
    shape = re.compile(r"\*|i\d+|e\d+|t[0-9a-f]{32}|probe:[0-9a-f]{32}")
    assert [word for word in words if not shape.fullmatch(word)] == []
    said = [f"{record.getMessage()} {record.exc_text or ''}" for record in caplog.records if _ours(record)]
    for secret in (SECRET, HEADER, session_id):
        assert [line for line in said if secret in line] == []


def _ours(record: logging.LogRecord) -> bool:
    """The test's own HTTP client and its debug output are no part of a node."""
    return not record.name.startswith(("httpcore", "httpx", "asyncio"))


@pytest.mark.parametrize("bind_to", ["client,subject", "subject"])
async def test_whose_a_session_is_may_leave_out_the_client(database: str, bind_to: str) -> None:
    """A client that registers anew is another client, and the same subject."""
    badges = {
        "first": ("old", "ada", "https://one"),
        "anew": ("new", "ada", "https://one"),
        "other": ("old", "bob", "https://one"),
        "elsewhere": ("old", "ada", "https://two"),
        "machine": ("old", None, "https://one"),
        "machine2": ("new", None, "https://one"),
    }

    class Registry:
        async def verify_token(self, token: str) -> AccessToken:
            client, subject, issuer = badges[token]
            claims = {"iss": issuer}
            return AccessToken(token=token, client_id=client, scopes=["use"], subject=subject, claims=claims)

    def make() -> MCPServer:
        made = server()
        made._token_verifier = Registry()

        @made.tool()
        async def whose() -> str:
            found = get_access_token()
            assert found is not None
            return f"{found.client_id} {found.subject}"

        return made

    async def status(who: str, session_id: str | None) -> int:
        headers = {"authorization": f"Bearer {who}", "mcp-session-id": str(session_id)}
        return (await raw(nodes[1].url, "POST", headers, PING)).status_code

    async with (
        cluster(database, make, 2, bind_to=bind_to) as nodes,
        tables_of(database) as tables,
        RawSession(headers={"authorization": "Bearer first"}) as session,
        RawSession(headers={"authorization": "Bearer machine"}) as machine,
    ):
        await session.open(nodes[0].url)
        await machine.open(nodes[0].url)
        kept = 200 if bind_to == "subject" else 404
        whose = {"first": 200, "anew": kept, "other": 404, "elsewhere": 404, "machine": 404}
        assert {who: await status(who, session.session_id) for who in whose} == whose
        for who in ("machine2", "first", "anew"):  # without a subject, the client
            assert await status(who, machine.session_id) == 404
        told = await session.call_tool(nodes[1].url, "whose")
        assert told["content"][0]["text"] == "old ada"  # the handler sees the token as it is
        names = {row["principal"] for row in await tables.rows("select principal from pgmcp.live_sessions")}
        expected = {"subject": "ada@https://one", "client,subject": "ada@https://one via old"}
        assert names == {expected[bind_to], "https://one via old"}
