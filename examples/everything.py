"""One server that uses every part of MCP: ``pgmcp up examples/everything.py:mcp``.

It is an ordinary server of the official SDK and knows nothing of pgmcp. The names that start with ``test_`` are those
that the official conformance suite calls. Questions to the client exist in two forms: up to 2025-11-25 the server
sends a request and waits (``ctx.elicit``), from 2026-07-28 on it returns an ``InputRequiredResult`` and is called anew.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Annotated, Any, Literal

import anyio
from mcp import MCPError, types
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Audio, Context, Image, MCPServer, UserMessage
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from pydantic import BaseModel, Field

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")
WAV = base64.b64decode("UklGRigAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQQAAACAgICA")
LEVELS: tuple[types.LoggingLevel, ...] = (
    "debug",
    "info",
    "notice",
    "warning",
    "error",
    "critical",
    "alert",
    "emergency",
)
WATCHED = "test://watched-resource"


# A tool whose input schema is written by hand, because no Python signature says all of this.

CONTACT_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}


def json_schema_2020_12_tool(
    name: str = "",
    address: dict[str, str] | None = None,
    contactMethod: str = "",  # noqa: N803 - the name on the wire
    phone: str = "",
    email: str = "",
) -> str:
    """Take an argument object that only a JSON Schema 2020-12 describes."""
    return f"{name} of {address}: {contactMethod} {phone or email}"


mcp = MCPServer(
    "everything",
    version="1.0",
    instructions="Every feature of MCP once. Nothing here has an effect outside of the server.",
    tools=[Tool.from_function(json_schema_2020_12_tool).model_copy(update={"parameters": CONTACT_SCHEMA})],
)


# What the server keeps in memory, by session: lost when its process dies, unless the client's messages bring it back.

counters: Counter[str] = Counter()
slow_calls: Counter[str] = Counter()
log_levels: dict[str, types.LoggingLevel] = {}
subscribers: dict[str, set[str]] = {}
watched_text = ["Nothing happened yet."]


def session_of(request: Any) -> str:
    """Name the session that an HTTP request belongs to; empty without sessions (stdio, 2026-07-28)."""
    headers = getattr(request, "headers", None) or {}
    return str(headers.get("mcp-session-id", ""))


@mcp.tool()
def count(ctx: Context) -> int:
    """Count the calls of this session."""
    session = session_of(ctx.request_context.request)
    counters[session] += 1
    return counters[session]


@mcp.tool()
async def slow(seconds: float, steps: Annotated[int, Field(ge=1)], ctx: Context) -> str:
    """Work for some seconds and report progress after each step."""
    session = session_of(ctx.request_context.request)
    slow_calls[session] += 1
    try:
        for step in range(1, steps + 1):
            await anyio.sleep(seconds / steps)
            await ctx.report_progress(step, steps)
    finally:  # also when the client cancels the call
        slow_calls[session] -= 1
    return f"{steps} steps in {seconds:g} s"


@mcp.tool()
def slow_calls_running(ctx: Context) -> int:
    """Tell how many calls of ``slow`` this session has in progress."""
    return slow_calls[session_of(ctx.request_context.request)]


# Content


@mcp.tool()
def test_simple_text() -> str:
    """Return one text."""
    return "This is a simple text response for testing."


@mcp.tool()
def test_image_content() -> Image:
    """Return one image."""
    return Image(data=PNG, format="png")


@mcp.tool()
def test_audio_content() -> Audio:
    """Return one sound."""
    return Audio(data=WAV, format="wav")


def embedded(uri: str, text: str, mime_type: str = "text/plain") -> types.EmbeddedResource:
    """Wrap a text as a resource that travels inside a result."""
    return types.EmbeddedResource(resource=types.TextResourceContents(uri=uri, mime_type=mime_type, text=text))


@mcp.tool()
def test_embedded_resource() -> types.EmbeddedResource:
    """Return a resource inside the result."""
    return embedded("test://embedded-resource", "This is an embedded resource content.")


@mcp.tool(structured_output=False)
def test_multiple_content_types() -> list[Any]:
    """Return text, image and resource together."""
    return [
        "Multiple content types test:",
        Image(data=PNG, format="png"),
        embedded("test://mixed-content-resource", json.dumps({"test": "data", "value": 123}), "application/json"),
    ]


@mcp.tool()
def test_error_handling() -> str:
    """Fail in a way that the model should read."""
    message = "This tool intentionally returns an error for testing"
    raise ToolError(message)


@mcp.tool()
def test_x_mcp_header(region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})]) -> str:
    """Take an argument that clients repeat as the HTTP header Mcp-Param-Region."""
    return f"region: {region}"


# Messages on the way to the result


async def log(ctx: Context, level: types.LoggingLevel, text: str) -> None:
    """Send a log message if the session's level lets it pass."""
    lowest = log_levels.get(session_of(ctx.request_context.request), "debug")
    if LEVELS.index(level) >= LEVELS.index(lowest):
        await ctx.log(level, text, logger_name="everything")


@mcp.tool()
async def test_tool_with_logging(ctx: Context) -> str:
    """Send three log messages at level info."""
    await log(ctx, "info", "Tool execution started")
    await anyio.sleep(0.05)
    await log(ctx, "info", "Tool processing data")
    await anyio.sleep(0.05)
    await log(ctx, "info", "Tool execution completed")
    return "Three messages were logged."


@mcp.tool()
async def test_tool_with_progress(ctx: Context) -> str:
    """Report progress three times."""
    for progress in (0, 50, 100):
        await ctx.report_progress(progress, 100)
        await anyio.sleep(0.05)
    return "Progress was reported three times."


@mcp.tool()
async def test_reconnection(ctx: Context) -> str:
    """Close the client's stream and answer when it has come back."""
    await ctx.close_sse_stream()
    await anyio.sleep(0.1)
    return "This answer came after the stream was closed."


@mcp.tool()
async def test_trigger_tool_change(ctx: Context) -> str:
    """Add a tool and take it away again; both are announced."""
    mcp.add_tool(test_simple_text, name="test_temporary_tool", description="Exists for a moment.")
    await ctx.notify_tools_changed()
    mcp.remove_tool("test_temporary_tool")
    await ctx.notify_tools_changed()
    return "The list of tools changed."


@mcp.tool()
async def test_trigger_prompt_change(ctx: Context) -> str:
    """Add a prompt and take it away again; both are announced."""
    mcp.prompt(name="test_temporary_prompt", description="Exists for a moment.")(test_simple_prompt)
    await ctx.notify_prompts_changed()
    mcp.remove_prompt("test_temporary_prompt")
    await ctx.notify_prompts_changed()
    return "The list of prompts changed."


@mcp.tool()
async def touch_watched_resource(text: str, ctx: Context) -> int:
    """Change the watched resource, tell whoever subscribed; return how many sessions of this process that are."""
    watched_text[0] = text
    await ctx.notify_resource_updated(WATCHED)
    return len(subscribers.get(WATCHED, ()))


# Questions to the client, up to 2025-11-25: the tool waits for the answer


class Contact(BaseModel):
    """The form that ``test_elicitation`` shows."""

    username: str = Field(description="User's response")
    email: str = Field(description="User's email address")


class Defaults(BaseModel):
    """A form in which every field is already filled in (SEP-1034)."""

    name: str = "John Doe"
    age: int = 30
    score: float = 95.5
    status: Literal["active", "inactive", "pending"] = "active"
    verified: bool = True


OPTIONS = ["option1", "option2", "option3"]
CHOICES = [{"const": f"value{n}", "title": f"{name} Option"} for n, name in enumerate(("First", "Second", "Third"), 1)]
ENUMS: dict[str, Any] = {  # the five ways to offer a choice (SEP-1330)
    "type": "object",
    "properties": {
        "untitledSingle": {"type": "string", "enum": OPTIONS},
        "titledSingle": {"type": "string", "oneOf": CHOICES},
        "legacyEnum": {
            "type": "string",
            "enum": ["opt1", "opt2", "opt3"],
            "enumNames": ["Option One", "Option Two", "Option Three"],
        },
        "untitledMulti": {"type": "array", "items": {"type": "string", "enum": OPTIONS}},
        "titledMulti": {"type": "array", "items": {"anyOf": CHOICES}},
    },
}


async def ask(ctx: Context, message: str, form: type[BaseModel]) -> str:
    """Show a form to the user and put the answer into words."""
    answer = await ctx.elicit(message, form)
    content = answer.data.model_dump() if answer.action == "accept" else None
    return f"action={answer.action}, content={json.dumps(content)}"


@mcp.tool()
async def test_elicitation(message: str, ctx: Context) -> str:
    """Ask the user for name and email address."""
    return f"User response: {await ask(ctx, message, Contact)}"


@mcp.tool()
async def test_elicitation_sep1034_defaults(ctx: Context) -> str:
    """Ask the user to confirm values that are already filled in."""
    return f"Elicitation completed: {await ask(ctx, 'Please review the values.', Defaults)}"


@mcp.tool()
async def test_elicitation_sep1330_enums(ctx: Context) -> str:
    """Ask the user to choose, in five ways."""
    answer = await ctx.session.elicit_form("Please choose.", ENUMS, related_request_id=ctx.request_id)
    return f"Elicitation completed: action={answer.action}, content={json.dumps(answer.content)}"


@mcp.tool()
async def test_sampling(prompt: str, ctx: Context) -> str:
    """Ask the client's language model."""
    message = types.SamplingMessage(role="user", content=types.TextContent(text=prompt))
    answer = await ctx.session.create_message([message], max_tokens=100, related_request_id=ctx.request_id)
    text = answer.content.text if isinstance(answer.content, types.TextContent) else answer.content.type
    return f"LLM response: {text}"


@mcp.tool()
async def client_roots(ctx: Context) -> list[str]:
    """Ask the client for its roots; this question travels on the session's standalone stream."""
    return [str(root.uri) for root in (await ctx.session.list_roots()).roots]


# Questions to the client, from 2026-07-28 on: the tool returns and is called again with the answers


def form_request(message: str, field: str, kind: str = "string") -> types.ElicitRequest:
    """Ask for one field."""
    schema = {"type": "object", "properties": {field: {"type": kind}}, "required": [field]}
    return types.ElicitRequest(params=types.ElicitRequestFormParams(message=message, requested_schema=schema))


def sampling_request(text: str, max_tokens: int) -> types.CreateMessageRequest:
    """Ask the client's language model."""
    message = types.SamplingMessage(role="user", content=types.TextContent(text=text))
    return types.CreateMessageRequest(
        params=types.CreateMessageRequestParams(messages=[message], max_tokens=max_tokens)
    )


def roots_request() -> types.ListRootsRequest:
    """Ask for the client's roots."""
    return types.ListRootsRequest(params=types.RequestParams())


def answer_to(ctx: Context, key: str) -> Any:
    """Return the client's answer to a question, None if there is none yet; other keys are ignored."""
    return (ctx.input_responses or {}).get(key)


def field_of(answer: Any, field: str) -> Any:
    """Return a field of an accepted form, None otherwise."""
    accepted = isinstance(answer, types.ElicitResult) and answer.action == "accept"
    return (answer.content or {}).get(field) if accepted else None


def missing_capability(**needed: Any) -> MCPError:
    """Build the error for a client that cannot do what the tool needs."""
    needs = types.MissingRequiredClientCapabilityErrorData(required_capabilities=types.ClientCapabilities(**needed))
    return MCPError(
        types.MISSING_REQUIRED_CLIENT_CAPABILITY,
        f"This tool needs a client with {', '.join(needed)}.",
        needs.model_dump(by_alias=True, mode="json", exclude_none=True),
    )


@mcp.tool()
def test_missing_capability(ctx: Context) -> str:
    """Refuse clients that cannot sample."""
    capabilities = ctx.client_capabilities
    if capabilities is None or capabilities.sampling is None:
        raise missing_capability(sampling=types.SamplingCapability())
    return "The client can sample."


@mcp.tool()
def test_input_required_result_elicitation(ctx: Context) -> str | types.InputRequiredResult:
    """Ask for a name and greet."""
    name = field_of(answer_to(ctx, "user_name"), "name")
    if name is None:
        return types.InputRequiredResult(input_requests={"user_name": form_request("What is your name?", "name")})
    return f"Hello, {name}!"


@mcp.tool()
def test_input_required_result_sampling(ctx: Context) -> str | types.InputRequiredResult:
    """Ask the client's language model a question."""
    answer = answer_to(ctx, "capital_question")
    if not isinstance(answer, types.CreateMessageResult):
        question = sampling_request("What is the capital of France?", 100)
        return types.InputRequiredResult(input_requests={"capital_question": question})
    return answer.content.text if isinstance(answer.content, types.TextContent) else answer.content.type


@mcp.tool()
def test_input_required_result_list_roots(ctx: Context) -> str | types.InputRequiredResult:
    """Ask for the client's roots."""
    answer = answer_to(ctx, "client_roots")
    if not isinstance(answer, types.ListRootsResult):
        return types.InputRequiredResult(input_requests={"client_roots": roots_request()})
    return "Roots: " + ", ".join(f"{root.name} ({root.uri})" for root in answer.roots)


def confirm(ctx: Context) -> str | types.InputRequiredResult:
    """Ask for a confirmation; the state that goes along is sealed by the SDK and comes back unchanged or not at all."""
    if ctx.request_state != "asked" or field_of(answer_to(ctx, "confirm"), "ok") is None:
        question = form_request("Please confirm", "ok", "boolean")
        return types.InputRequiredResult(input_requests={"confirm": question}, request_state="asked")
    return "state-ok"


@mcp.tool()
def test_input_required_result_request_state(ctx: Context) -> str | types.InputRequiredResult:
    """Carry state from the question to the answer."""
    return confirm(ctx)


@mcp.tool()
def test_input_required_result_tampered_state(ctx: Context) -> str | types.InputRequiredResult:
    """Refuse state that was changed on its way."""
    return confirm(ctx)


@mcp.tool()
def test_input_required_result_multiple_inputs(ctx: Context) -> str | types.InputRequiredResult:
    """Ask three questions at once."""
    answers = {key: answer_to(ctx, key) for key in ("user_name", "greeting", "client_roots")}
    if ctx.request_state != "asked" or None in answers.values():
        questions: types.InputRequests = {
            "user_name": form_request("What is your name?", "name"),
            "greeting": sampling_request("Generate a greeting", 50),
            "client_roots": roots_request(),
        }
        return types.InputRequiredResult(input_requests=questions, request_state="asked")
    return f"{field_of(answers['user_name'], 'name')} answered all questions."


@mcp.tool()
def test_input_required_result_multi_round(ctx: Context) -> str | types.InputRequiredResult:
    """Ask a second question after the first; the state carries what is known so far."""
    known = json.loads(ctx.request_state or "{}")
    name = known.get("name") or field_of(answer_to(ctx, "step1"), "name")
    if ctx.request_state is None or name is None:
        question = form_request("Step 1: What is your name?", "name")
        return types.InputRequiredResult(input_requests={"step1": question}, request_state="{}")
    color = field_of(answer_to(ctx, "step2"), "color")
    if color is None:
        question = form_request("Step 2: What is your favorite color?", "color")
        return types.InputRequiredResult(input_requests={"step2": question}, request_state=json.dumps({"name": name}))
    return f"{name} likes {color}."


@mcp.tool()
def test_input_required_result_capabilities(ctx: Context) -> str | types.InputRequiredResult:
    """Ask only what the client is able to answer."""
    can = ctx.client_capabilities or types.ClientCapabilities()
    questions: types.InputRequests = {}
    if can.elicitation is not None:
        questions["user_name"] = form_request("What is your name?", "name")
    if can.sampling is not None:
        questions["greeting"] = sampling_request("Generate a greeting", 50)
    if can.roots is not None:
        questions["client_roots"] = roots_request()
    if not questions or any(answer_to(ctx, key) is not None for key in questions):
        return "No more questions."
    return types.InputRequiredResult(input_requests=questions)


# Resources


@mcp.resource("test://static-text", name="static_text_resource", mime_type="text/plain")
def static_text() -> str:
    """A text that never changes."""
    return "This is the content of the static text resource."


@mcp.resource("test://static-binary", name="static_binary_resource", mime_type="image/png")
def static_binary() -> bytes:
    """An image that never changes."""
    return PNG


@mcp.resource(WATCHED, name="watched_resource", mime_type="text/plain")
def watched() -> str:
    """A text to subscribe to; the tool touch_watched_resource changes it."""
    return watched_text[0]


@mcp.resource("test://template/{id}/data", name="template_resource", mime_type="application/json")
def template(id: str) -> str:  # noqa: A002 - the name in the template
    """Data for any id."""
    return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


# Prompts


@mcp.prompt()
def test_simple_prompt() -> str:
    """A simple prompt without arguments."""
    return "This is a simple prompt for testing."


@mcp.prompt()
def test_prompt_with_arguments(
    arg1: Annotated[str, Field(description="First test argument")],
    arg2: Annotated[str, Field(description="Second test argument")],
) -> str:
    """A prompt with required arguments."""
    return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"


@mcp.prompt()
def test_prompt_with_embedded_resource(
    resourceUri: Annotated[str, Field(description="URI of the resource to embed")],  # noqa: N803 - the name on the wire
) -> list[UserMessage]:
    """A prompt that includes an embedded resource."""
    return [
        UserMessage(embedded(resourceUri, "Embedded resource content for testing.")),
        UserMessage("Please process the embedded resource above."),
    ]


@mcp.prompt()
def test_prompt_with_image() -> list[UserMessage]:
    """A prompt that includes image content."""
    return [UserMessage(Image(data=PNG, format="png")), UserMessage("Please analyze the image above.")]


@mcp.prompt()
def test_input_required_result_prompt(ctx: Context) -> str | types.InputRequiredResult:
    """A prompt that asks the user something first."""
    context = field_of(answer_to(ctx, "user_context"), "context")
    if context is None:
        question = form_request("What context should the prompt use?", "context")
        return types.InputRequiredResult(input_requests={"user_context": question})
    return f"Use this context: {context}"


# Completion, log level and subscriptions


@mcp.completion()  # type: ignore[no-untyped-call, untyped-decorator]
async def complete(
    ref: types.PromptReference | types.ResourceTemplateReference,
    argument: types.CompletionArgument,
    context: types.CompletionContext | None,
) -> types.Completion:
    """Offer places that start with what was typed."""
    del ref, context
    values = [place for place in ("paris", "park", "party", "porto") if place.startswith(argument.value)]
    return types.Completion(values=values, total=len(values), has_more=False)


async def set_level(ctx: ServerRequestContext[Any], params: types.SetLevelRequestParams) -> types.EmptyResult:
    """Remember below which level the session wants no log messages."""
    log_levels[session_of(ctx.request)] = params.level
    return types.EmptyResult()


async def subscribe(ctx: ServerRequestContext[Any], params: types.SubscribeRequestParams) -> types.EmptyResult:
    """Remember that the session wants to hear of changes of a resource."""
    subscribers.setdefault(str(params.uri), set()).add(session_of(ctx.request))
    return types.EmptyResult()


async def unsubscribe(ctx: ServerRequestContext[Any], params: types.UnsubscribeRequestParams) -> types.EmptyResult:
    """Forget the session's subscription."""
    subscribers.get(str(params.uri), set()).discard(session_of(ctx.request))
    return types.EmptyResult()


lowlevel = mcp._lowlevel_server  # noqa: SLF001 - MCPServer has no decorators for these three
lowlevel.add_request_handler("logging/setLevel", types.SetLevelRequestParams, set_level)
lowlevel.add_request_handler("resources/subscribe", types.SubscribeRequestParams, subscribe)
lowlevel.add_request_handler("resources/unsubscribe", types.UnsubscribeRequestParams, unsubscribe)
