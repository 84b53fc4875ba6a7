"""The official Python client through a balancer without stickiness, in front of three nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from mcp import Client, types
from mcp.client.session import ClientRequestContext
from pydantic import FileUrl

from tests.harness.clients import connect
from tests.harness.nginx import Nginx
from tests.harness.processes import nodes
from tests.harness.waiting import eventually

WATCHED = "test://watched-resource"

pytestmark = [
    pytest.mark.filterwarnings("ignore::mcp.MCPDeprecationWarning"),  # sampling, roots, logging and subscribe
]


@pytest.fixture(scope="module")
def balancer(shared_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """Three nodes on one database, and nginx in front of them."""
    logs = tmp_path_factory.mktemp("logs")
    with (
        nodes("examples/everything.py:mcp", 3, database_url=shared_database, log_dir=logs) as members,
        Nginx([node.port for node in members]) as nginx,
    ):
        yield nginx


class Progress:
    """Collects progress reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, float | None]] = []
        self.first = asyncio.Event()

    async def __call__(self, progress: float, total: float | None, message: str | None) -> None:
        del message
        self.reports.append((progress, total))
        self.first.set()


async def value(client: Client, tool: str, **arguments: Any) -> Any:
    """Call a tool that returns one value."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    assert result.structured_content is not None
    return result.structured_content["result"]


async def text(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that returns one text."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    assert isinstance(result.content[0], types.TextContent)
    return result.content[0].text


async def accept(context: ClientRequestContext, params: types.ElicitRequestParams) -> types.ElicitResult:
    """Fill in every field of a form with its own name."""
    del context
    assert isinstance(params, types.ElicitRequestFormParams)
    return types.ElicitResult(action="accept", content={name: name for name in params.requested_schema["properties"]})


async def test_the_state_of_a_session_is_one_whichever_node_is_hit(balancer: Nginx) -> None:
    async with connect(balancer.mcp_url) as client:
        assert [await value(client, "count") for _ in range(12)] == list(range(1, 13))
        async with connect(balancer.mcp_url) as other:
            assert await value(other, "count") == 1
        assert await value(client, "count") == 13
    posts = [exchange for exchange in balancer.wait_for_exchanges(18) if exchange.method == "POST"]
    assert {exchange.ports for exchange in posts} == {(port,) for port in balancer.ports}
    assert {exchange.status for exchange in posts} == {200, 202}


async def test_tools_resources_prompts_and_completion(balancer: Nginx) -> None:
    async with connect(balancer.mcp_url) as client:
        assert {"count", "slow", "test_simple_text"} <= {tool.name for tool in (await client.list_tools()).tools}
        assert await text(client, "test_simple_text") == "This is a simple text response for testing."
        assert (await client.call_tool("test_error_handling")).is_error
        [content] = (await client.read_resource("test://template/7/data")).contents
        assert isinstance(content, types.TextResourceContents)
        assert "Data for ID: 7" in content.text
        prompt = await client.get_prompt("test_prompt_with_arguments", {"arg1": "a", "arg2": "b"})
        assert "arg1='a'" in str(prompt.messages[0].content)
        reference = types.PromptReference(name="test_prompt_with_arguments")
        completed = await client.complete(reference, {"name": "arg1", "value": "par"})
        assert completed.completion.values == ["paris", "park", "party"]
        await client.send_ping()


async def test_progress_arrives_in_order_and_before_the_result(balancer: Nginx) -> None:
    async with connect(balancer.mcp_url) as client:
        for _ in range(3):
            progress = Progress()
            result = await client.call_tool("slow", {"seconds": 0.3, "steps": 10}, progress_callback=progress)
            assert not result.is_error
            assert progress.reports == [(step, 10) for step in range(1, 11)]


async def test_calls_at_the_same_time_get_their_own_answers(balancer: Nginx) -> None:
    async with connect(balancer.mcp_url) as client:
        durations = [0.01 * n for n in range(1, 13)]
        answers = await asyncio.gather(*(text(client, "slow", seconds=one, steps=1) for one in durations))
    assert answers == [f"1 steps in {one:g} s" for one in durations]


async def test_questions_to_the_client_and_their_answers(balancer: Nginx) -> None:
    async def sample(
        context: ClientRequestContext, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult:
        del context
        content = types.TextContent(text=f"{len(params.messages)} message")
        return types.CreateMessageResult(role="assistant", content=content, model="none")

    async def roots(context: ClientRequestContext) -> types.ListRootsResult:
        del context
        return types.ListRootsResult(roots=[types.Root(uri=FileUrl("file:///root"), name="root")])

    callbacks: dict[str, Any] = {
        "elicitation_callback": accept,
        "sampling_callback": sample,
        "list_roots_callback": roots,
    }
    async with connect(balancer.mcp_url, **callbacks) as client:
        for _ in range(3):  # so that the answers arrive at every node
            answer = await text(client, "test_elicitation", message="Who are you?")
            assert answer == 'User response: action=accept, content={"username": "username", "email": "email"}'
            assert await text(client, "test_sampling", prompt="Hello?") == "LLM response: 1 message"
            assert await value(client, "client_roots") == ["file:///root"]


async def test_resource_updates_reach_subscribers_until_they_unsubscribe(balancer: Nginx) -> None:
    updated: asyncio.Queue[str] = asyncio.Queue()

    async def receive(message: types.ServerNotification | Exception) -> None:
        if isinstance(message, types.ResourceUpdatedNotification):
            updated.put_nowait(str(message.params.uri))

    async with connect(balancer.mcp_url, message_handler=receive) as client:
        assert await value(client, "touch_watched_resource", text="nobody listens") == 0
        await client.subscribe_resource(WATCHED)
        for n in range(3):
            assert await value(client, "touch_watched_resource", text=f"change {n}") == 1
            assert await asyncio.wait_for(updated.get(), 10) == WATCHED
            [content] = (await client.read_resource(WATCHED)).contents
            assert isinstance(content, types.TextResourceContents)
            assert content.text == f"change {n}"
        await client.unsubscribe_resource(WATCHED)
        assert await value(client, "touch_watched_resource", text="nobody listens any more") == 0
        assert updated.empty()


async def test_log_messages_obey_the_level_of_the_session(balancer: Nginx) -> None:
    logged: list[Any] = []

    async def log(params: types.LoggingMessageNotificationParams) -> None:
        logged.append(params.data)

    async with connect(balancer.mcp_url, logging_callback=log) as client:
        await client.set_logging_level("warning")
        await text(client, "test_tool_with_logging")
        assert logged == []
        await client.set_logging_level("info")
        await text(client, "test_tool_with_logging")
        assert logged == ["Tool execution started", "Tool processing data", "Tool execution completed"]


async def test_a_cancelled_call_stops_at_its_owner(balancer: Nginx) -> None:
    async with connect(balancer.mcp_url) as client:
        for _ in range(3):  # so that the cancellation arrives at every node
            progress = Progress()
            call = asyncio.create_task(
                client.call_tool("slow", {"seconds": 60, "steps": 600}, progress_callback=progress)
            )
            await asyncio.wait_for(progress.first.wait(), 10)
            assert await value(client, "slow_calls_running") == 1
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

            async def stopped() -> bool:
                return bool(await value(client, "slow_calls_running") == 0)

            await eventually(stopped, "the tool is stopped")
        assert await value(client, "count") == 1
