"""Every option of a node in one object.

Each field is a command line option and a ``PGMCP_`` variable; its description is the text of both and of the
generated reference. Settings that cannot keep the lease rules are refused here, before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pgmcp.errors import SettingsError

_SPLIT = BeforeValidator(
    lambda given: tuple(filter(None, map(str.strip, given.split(",")))) if isinstance(given, str) else given
)
Names = Annotated[tuple[str, ...], NoDecode, _SPLIT]
"""Several names; one text with commas in a variable."""

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
"""Seconds that a unit has, as durations are written."""

_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)\s*(ms|s|m|h|d)?", re.ASCII)


def seconds(given: object) -> object:
    """A duration's seconds: of ``1.5s``, ``250ms``, ``12h``, ``30d``, or of plain seconds; what is no text stays.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(given, str):
        return given
    found = _DURATION.fullmatch(given.strip())
    if found is None:
        message = f"{given!r} is no duration: write seconds, or 250ms, 1.5s, 5m, 12h, 30d"
        raise ValueError(message)
    return float(found[1]) * UNITS[found[2] or "s"]


def written(duration: float) -> str:
    """A duration in the largest unit of which it is a whole number."""
    if not duration:
        return "0"
    units = ("d", "h", "m", "s") if duration >= 2 * UNITS["m"] else ("s",)
    unit = next((unit for unit in units if duration % UNITS[unit] == 0), "ms" if duration < 1 else "s")
    return f"{duration / UNITS[unit]:g}{unit}"


LONGEST = 36_500 * UNITS["d"]
"""Seconds of the longest duration: PostgreSQL's and Python's times reach as far, and nothing here lasts longer."""


def _bounded(duration: float) -> float:
    if duration > LONGEST:
        message = f"the longest duration is {written(LONGEST)}"
        raise ValueError(message)
    return duration


Seconds = Annotated[float, BeforeValidator(seconds), AfterValidator(_bounded)]
"""A duration."""

IN_FILE = "file:"
"""Begins what stands in the place of a database's address when that lies in a file: the file's path follows."""


def in_file(name: str, url: str, path: str) -> str:
    """What goes for an address that was given itself or by the name of a file.

    Raises:
        ValueError: it was given in both ways.
    """
    if url and path and url != IN_FILE + path:
        option = name.replace("_", "-")
        message = f"give --{option} or --{option}-file, not both"
        raise ValueError(message)
    return IN_FILE + path if path else url


LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Settings(BaseSettings):
    """The settings of one node; unset fields come from ``PGMCP_…`` variables, then from the defaults.

    Raises:
        SettingsError: a value is malformed, or the lease times contradict each other.
    """

    model_config = SettingsConfigDict(env_prefix="PGMCP_", frozen=True, extra="forbid", populate_by_name=True)

    database_url: str = Field(
        "", description="PostgreSQL to coordinate through: postgresql://user:password@host/db (or @host1,host2/db)."
    )
    database_url_file: str = Field(
        "", description="File with the address of --database-url in its place, read anew for each connection."
    )
    listen_url: str = Field(
        "", description="Direct connection for LISTEN and leases, when --database-url goes through a pooler."
    )
    listen_url_file: str = Field("", description="File with the address of --listen-url, likewise.")
    schema_name: str = Field(
        "pgmcp",
        validation_alias="PGMCP_SCHEMA",
        pattern=r"^[a-z_][a-z0-9_]{0,40}$",
        description="Schema of pgmcp's tables.",
    )
    cluster: str = Field(
        "",
        max_length=200,
        description="Name of what the cluster serves, the same on all its nodes; default: the served server's name.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    node_name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.-]{0,63}$",
        description="Label of the node, also in session ids; default: the host's name, "
        "with the process id where several are on one host.",
    )
    affinity_cookie: bool = Field(
        True, description="Tell clients the name of their session's owner in a cookie, for balancers that may use it."
    )
    address: str = Field(
        "",
        description="host:port that operators read in `pgmcp nodes` and pgmcp.live_nodes; nothing connects to it. "
        "Default: where `pgmcp serve` listens, `unknown` inside another ASGI server.",
    )
    eras: Annotated[tuple[Literal["legacy", "modern"], ...], NoDecode, _SPLIT] = Field(
        ("legacy", "modern"),
        min_length=1,
        description="What is served: legacy (2024-11-05 to 2025-11-25, with sessions), modern (2026-07-28), or both; "
        "the same on all nodes.",
    )
    mcp_path: str = Field("/mcp", pattern=r"^/[\w./-]*[\w-]$", description="Path of the Streamable HTTP endpoint.")
    sse_path: str = Field("/sse", pattern=r"^/[\w./-]*[\w-]$", description="Path of the HTTP+SSE stream (2024-11-05).")
    messages_path: str = Field(
        "/messages/", pattern=r"^/[\w./-]*[\w-]/?$", description="Path to which HTTP+SSE clients POST their messages."
    )
    allowed_hosts: Names = Field(
        (),
        description="Host headers to accept, with commas between them: host (443 or 80), host:port or host:* (any "
        "other port); default on a loopback address: loopback names.",
    )
    allowed_origins: Names = Field(
        (),
        description="Origin headers to accept, with commas between them; "
        "default on a loopback address: loopback names.",
    )
    cors_origins: Names = Field(
        (),
        description="Origins of web pages whose scripts may call this server (CORS), with commas between them; "
        "http://localhost:* is any port, * any page.",
    )
    middleware: Names = Field(
        (),
        description="ASGI middleware around the node, as module:attribute or path/to/file.py:attribute, "
        "with commas between them, outermost first.",
    )
    bind_to: Literal["client,subject", "subject"] = Field(
        "client,subject",
        description="Whose a session is: the token's client and subject, or its subject alone; the same on all nodes.",
    )
    forwarded_allow_ips: str = Field("127.0.0.1", description="Proxies whose X-Forwarded headers are believed.")
    response: Literal["sse", "json", "auto"] = Field("sse", description="How a POST is answered.")
    log_format: Literal["text", "json"] = Field("text", description="How log lines look.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level of the log lines that are written."
    )
    access_log: bool = Field(False, description="Write a line for each HTTP exchange, at its end.")
    wait: Seconds = Field(
        60.0,
        ge=0,
        description="How long a node that starts waits for a database that is away, before it ends with exit code 3.",
    )
    hold: Seconds = Field(
        25.0,
        gt=0,
        description="How long a POST waits for a database that is away before it is answered 503; /readyz is 503 from "
        "then on.",
    )
    resume_hold: Seconds = Field(
        55.0, gt=0, description="How long a GET that resumes a stream waits for a database that is away."
    )
    max_body: int = Field(4 * 1024 * 1024, gt=0, description="Bytes that a request body may have.")
    max_message: int = Field(
        64 * 1024 * 1024,
        ge=64 * 1024,
        le=96 * 1024 * 1024,
        description="Bytes that a server may write in one message.",
    )
    max_batch: int = Field(100, gt=0, description="Messages that a 2025-03-26 batch may have.")
    max_elements: int = Field(
        50_000,
        gt=0,
        description="Brackets, colons and commas that a message may have outside of strings, and as many strings.",
    )
    max_depth: int = Field(100, gt=0, le=200, description="Levels of nesting that a message may have.")
    max_sessions: int = Field(10_000, gt=0, description="Sessions that the cluster may have.")
    max_sessions_per_caller: int = Field(
        1_000, gt=0, description="Sessions that one caller may have; without authentication, one address of clients."
    )
    max_in_flight: int = Field(100, gt=0, description="Requests of one session that may be unfinished.")
    max_streams: int = Field(100, gt=0, description="Streams of one session that may be open at once.")
    max_connections: int = Field(
        1_000, gt=0, description="Connections that one address may have open on a node; trusted proxies have no limit."
    )
    max_exchanges: int = Field(
        5_000,
        gt=0,
        description="Exchanges of 2026-07-28 that a node may have open; one caller a quarter, alone three quarters.",
    )
    max_listens: int = Field(
        1_000, gt=0, description="subscriptions/listen streams that a node may have open; shared in the same way."
    )
    rate: float = Field(0.0, ge=0, description="POSTs of one caller that a node takes in a second; 0: any number.")
    initialize_rate: float = Field(
        20.0, ge=0, description="Sessions that one caller may open at a node in a second; 0: any number."
    )
    max_waiting_events: int = Field(
        256, gt=0, description="Standalone notifications that wait for a listener; 64 times as many while one is there."
    )
    read_timeout: Seconds = Field(30.0, gt=0, description="Seconds for which a client may take to send its body.")
    write_timeout: Seconds = Field(
        30.0, gt=0, description="Seconds for which a client may take nothing of what it is sent."
    )
    idle_timeout: Seconds = Field(1800.0, gt=0, description="Seconds after which an unused session ends.")
    max_age: Seconds = Field(7 * 86400.0, gt=0, description="Seconds after which any session ends.")
    retention: Seconds = Field(
        300.0, gt=0, description="Seconds for which what was finished or delivered can be fetched again."
    )
    pool_size: int = Field(6, ge=3, le=64, description="Database connections of a node, besides the one that listens.")
    keepalive: Seconds = Field(15.0, gt=0, description="Seconds between comments on a silent stream.")
    retry_ms: int = Field(
        1000,
        gt=0,
        description="Milliseconds after which a client should reconnect a stream that broke; the stream tells it "
        "(retry:).",
    )
    poll: Seconds = Field(2.0, gt=0, description="Seconds after which unfinished work is looked at without a wake-up.")
    idle_poll: Seconds = Field(30.0, gt=0, description="Seconds after which idle streams are looked at anyway.")
    renew: Seconds = Field(1.0, gt=0, description="Seconds between renewals of the lease.")
    deadline: Seconds = Field(
        1.5, gt=0, description="Seconds after which one renewal of the lease counts as failed and is tried again."
    )
    trust: Seconds = Field(
        7.0,
        gt=0,
        description="Seconds for which a node goes on working after its last renewal; then it pauses until one "
        "succeeds. At least renew + 2 * deadline + ttl / 10, less than ttl.",
    )
    ttl: Seconds = Field(
        10.0, gt=0, description="Seconds after its last renewal at which others take a silent node's sessions."
    )
    rerun: Names = Field(
        (), description="Tools that may run again after their node died, as names or patterns (get_*)."
    )
    on_owner_change: Literal["restore", "end"] = Field(
        "restore", description="What becomes of a session whose node died: restored elsewhere, or ended with 404."
    )
    drain_notice: Seconds = Field(
        5.0, ge=0, description="Seconds for which a node that got SIGTERM goes on serving, for balancers to notice."
    )
    drain_limit: Seconds = Field(
        25.0,
        gt=0,
        description="Seconds that a leaving node has to hand over and to finish: more than twice your longest call.",
    )
    key_rotation: Seconds = Field(
        30 * 86400.0,
        ge=3600,
        description="Seconds after which a new key takes over; older ones still open.",
    )
    secrets_key: str = Field(
        "", description="Wraps the keys in the database; 32 characters or more. Of several (a,b) the first wraps."
    )
    secrets_key_file: str = Field("", description="File with the secrets key, one a line if there are several.")
    encrypt_payloads: bool = Field(
        False, description="Encrypt what clients and servers say while it lies in the database; needs a secrets key."
    )
    single_use_states: bool = Field(False, description="Refuse a requestState (2026-07-28) that was used before.")
    statement_timeout: Seconds = Field(5.0, gt=0, description="Seconds that one database call may take.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc']) or 'settings'}: {problem['msg']}"
                for problem in error.errors(include_url=False, include_input=False)
            )
            message = f"Settings refused: {problems}. `pgmcp serve --help` lists every option."
            raise SettingsError(message) from None

    @field_validator("allowed_origins", "cors_origins")
    @classmethod
    def _as_browsers_write_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(origin.rstrip("/").lower() for origin in origins)

    @model_validator(mode="after")
    def _lease_times_agree(self) -> Settings:
        margin = 0.1 * self.ttl
        if not self.renew + 2 * self.deadline + margin <= self.trust < self.ttl:
            message = (
                f"renew + 2 * deadline + ttl / 10 <= trust < ttl must hold, but "
                f"{self.renew} + 2 * {self.deadline} + {margin} <= {self.trust} < {self.ttl} does not"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="before")
    @classmethod
    def _addresses_in_files(cls, values: dict[str, Any]) -> dict[str, Any]:
        """An address that lies in a file goes by the file's name: whoever connects reads it anew."""
        urls = {
            name: in_file(name, values.get(name) or "", values.get(f"{name}_file") or "")
            for name in ("database_url", "listen_url")
        }
        return {**values, **{name: url for name, url in urls.items() if url}}

    @model_validator(mode="after")
    def _one_place_for_the_key(self) -> Settings:
        if self.secrets_key and self.secrets_key_file:
            message = "give --secrets-key or --secrets-key-file, not both"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _a_key_to_encrypt(self) -> Settings:
        if self.encrypt_payloads and not (self.secrets_key or self.secrets_key_file):
            message = "--encrypt-payloads needs --secrets-key or --secrets-key-file: the database has the other keys"
            raise ValueError(message)
        return self

    @property
    def use_precision(self) -> float:
        """Seconds by which a session's last use may be later than its row says; it lives for so much longer."""
        return min(60.0, self.idle_timeout / 10)

    @property
    def silence(self) -> float:
        """Seconds without a renewal after which a node whose line has no backend any more counts as dead."""
        return self.renew + 0.5

    @property
    def line_url(self) -> str:
        """Where the line connects: never through a transaction pooler."""
        return self.listen_url or self.database_url

    @property
    def pooled(self) -> bool:
        """Whether the main connection goes through a pooler (no statement cache, no startup parameters)."""
        return bool(self.listen_url)


PREFIX = "PGMCP_"
OTHER_VARIABLES = frozenset({"PGMCP_WORKERS", "PGMCP_PG_BIN"})
"""Variables of ours that are no settings."""


def variable(name: str) -> str:
    """The environment variable of a field of ``Settings``."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else PREFIX + name.upper()


def unknown_variables(names: Iterable[str]) -> list[str]:
    """A line for each variable that looks like one of ours and is none, with the one that was probably meant."""
    fields = Settings.model_fields
    known = OTHER_VARIABLES.union(map(variable, fields), (PREFIX + name.upper() for name in fields))  # both are read
    shown = [variable(name).removeprefix(PREFIX) for name in fields]
    lines = []
    for name in sorted(names):
        given = name.upper()
        if not given.startswith(PREFIX) or given in known or given.startswith("PGMCP_TEST_"):  # of pgmcp's own tests
            continue
        near = get_close_matches(given.removeprefix(PREFIX), shown, 1, 0.7)
        hint = f"is {PREFIX}{near[0]} meant?" if near else "`pgmcp serve --help` lists all."
        lines.append(f"{name} is no variable of pgmcp and has no effect: {hint}")
    return lines
