"""Markdown whose code is run: Python blocks are files, shell blocks are typed in, one line after the other.

A document's code runs in a folder of its own, with an installed pgmcp first in the path. What a machine cannot have
twice (ports, databases) is replaced; the test says by what.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import httpx

from tests.harness.processes import REPOSITORY, ServerProcess

SERVERS = ("make up", "pgmcp up", "pgmcp serve", "uvicorn")
"""Commands that run until they are ended; the next command of the document is typed when they answer."""

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w/]+\.(?:py|ini))\n")
_COMMENT = re.compile(r"\s+#\s.*$")


class Block(NamedTuple):
    """A fenced block of code; ``language`` is empty for what is no code."""

    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document."""
    return [Block(*found) for found in _BLOCK.findall(path.read_text())]


def file_of(block: Block) -> str | None:
    """The file that a block is, by its first line."""
    found = _FILE.match(block.text)
    return found[1] if found else None


class Server(ServerProcess):
    """A server that a document starts; ready when it says so."""

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2, trust_env=False, verify=False).status_code == 200
        except httpx.HTTPError:
            return False


class Reader:
    """Somebody who follows a document.

    Args:
        folder: where they work.
        commands: the folder of the installed commands.
        replaced: texts, and what stands in their place here.
    """

    def __init__(self, folder: Path, commands: Path, replaced: Mapping[str, str]) -> None:
        self.folder, self.replaced = folder, dict(replaced)
        path = os.pathsep.join((str(commands), str(Path(sys.executable).parent), os.environ["PATH"]))
        self.env = {"PATH": path, "PYTHONUNBUFFERED": "1", "PGMCP_DRAIN_NOTICE": "0", "PGMCP_DRAIN_LIMIT": "1"}
        self.output = ""
        self._stack = ExitStack()
        self._servers: dict[int, Server] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def here(self, text: str) -> str:
        """A text of the document with the replacements."""
        for shipped, instead in self.replaced.items():
            text = text.replace(shipped, instead)
        return text

    def save(self, block: Block) -> None:
        """Write a block into its file."""
        name = file_of(block)
        assert name is not None, f"name the file in the first line, as # name.py: {block.text}"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.here(block.text))

    def follow(self, block: Block) -> None:
        """Type in a shell block."""
        for line in block.text.replace("\\\n", " ").splitlines():
            command = _COMMENT.sub("", line).strip()
            if command and not command.startswith("#"):
                self.type(self.here(command))
        self._wait()

    def type(self, command: str) -> None:
        """Type in one command."""
        if not command.startswith(SERVERS):
            self._wait()
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            self.env[name] = value
        elif command.startswith(SERVERS):
            self._start(command.removesuffix("&"))
        else:
            self.output = self.run(command)

    def run(self, command: str, timeout: float = 60) -> str:
        """Run a command to its end; what it said."""
        where = REPOSITORY if command.startswith("make ") else self.folder
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=where, env=os.environ | self.env, capture_output=True, check=False, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _start(self, command: str) -> None:
        found = re.search(r"--port (\d+)", command)
        assert found is not None, f"its port must be replaceable: {command}"
        port = int(found[1])
        self.end(port)
        where = REPOSITORY if command.startswith("make ") else self.folder
        server = Server(
            ["bash", "-c", f"cd {shlex.quote(str(where))} && exec {command}"],
            port=port,
            log_path=self.folder / f"{port}-{len(self._servers)}.log",
            env=self.env,
        )
        self._servers[port] = server
        self._stack.callback(server.stop)
        server.start()

    def _wait(self) -> None:
        for server in self._servers.values():
            server.wait_ready(60)

    def end(self, port: int) -> None:
        """End the server on a port, as Ctrl-C does."""
        if port in self._servers:
            code = self._servers.pop(port).terminate()
            assert code in (0, -signal.SIGTERM), code  # make and uvicorn end by the signal that they have obeyed
