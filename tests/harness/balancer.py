"""A real balancer in front of nodes, with a folder of its own: what nginx and haproxy have in common."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.harness.processes import ServerProcess, free_ports
from tests.harness.waiting import wait_until


class Exchange(NamedTuple):
    """One request that a balancer has finished; ``ports`` has every node that was tried, the last one answered."""

    method: str
    status: int
    ports: tuple[int, ...]
    path: str


def binary(name: str) -> str | None:
    """Find a balancer; None if it is not installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


class Balancer(ServerProcess):
    """A balancer in front of ports of 127.0.0.1.

    Args:
        name: of its program.
        package: what Debian calls it.
        port: where it listens; a free one unless given.
        directory: its folder; a temporary one unless given.
    """

    def __init__(self, name: str, package: str, ports: Sequence[int], port: int | None, directory: Path | None) -> None:
        program = binary(name)
        assert program is not None, f"{name} is not installed: apt-get install {package}"
        self.ports = tuple(ports)
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix=f"pgmcp-{name}-")
        self.directory = directory or Path(self._temporary.name)  # type: ignore[union-attr]
        self.directory.mkdir(parents=True, exist_ok=True)
        chosen = port or free_ports(1)[0]
        arguments = self.configure(chosen)
        super().__init__([program, *arguments], port=chosen, log_path=self.directory / "output.log")

    def configure(self, port: int) -> list[str]:
        """Write the configuration; the program's arguments."""
        raise NotImplementedError

    @property
    def exchanges(self) -> list[Exchange]:
        """The finished exchanges, oldest first; one that still streams is not among them."""
        raise NotImplementedError

    def wait_for_exchanges(self, count: int, timeout: float = 5) -> list[Exchange]:
        """Wait until so many exchanges are finished (a balancer logs after the client has its answer)."""
        wait_until(
            lambda: len(self.exchanges) >= count,
            timeout,
            lambda: f"{len(self.exchanges)} of {count} exchanges finished after {timeout} s",
        )
        return self.exchanges

    def stop(self) -> None:
        super().stop()
        if self._temporary is not None:
            self._temporary.cleanup()
