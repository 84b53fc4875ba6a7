"""A real haproxy that spreads requests over nodes in turn, with no stickiness of any kind."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.harness.nginx import Exchange
from tests.harness.processes import ServerProcess, free_ports, wait_until

# ``redispatch`` with ``conn-failure`` alone: another node is tried when the first refuses the connection, but a POST
# that was sent once is never repeated.
_CONFIGURATION = """
global
  maxconn 4096
  log stdout format raw local0
defaults
  mode http
  log global
  log-format "exchange %HM %ST %s %HP"
  balance roundrobin
  option redispatch 1
  option http-no-delay
  option httpchk GET /readyz
  retries 2
  retry-on conn-failure
  timeout connect 2s
  timeout client 1h
  timeout server 1h
  default-server check inter 500ms fall 2 rise 1
frontend clients
  bind 127.0.0.1:{port}
  default_backend nodes
backend nodes
{servers}
"""
_EXCHANGE = re.compile(r"^exchange (\S+) (-?\d+) port-(\d+) (\S+)$", re.MULTILINE)


def haproxy_binary() -> str | None:
    """Find haproxy; None if it is not installed."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


class Haproxy(ServerProcess):
    """haproxy in front of ports of 127.0.0.1, on a port and in a folder of its own."""

    def __init__(self, ports: Sequence[int], *, port: int | None = None, directory: Path | None = None) -> None:
        binary = haproxy_binary()
        assert binary is not None, "haproxy is not installed: apt-get install haproxy"
        self.ports = tuple(ports)
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="pgmcp-haproxy-")
        self.directory = directory or Path(self._temporary.name)  # type: ignore[union-attr]
        self.directory.mkdir(parents=True, exist_ok=True)
        chosen = port or free_ports(1)[0]
        servers = "\n".join(f"  server port-{one} 127.0.0.1:{one}" for one in self.ports)
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(_CONFIGURATION.format(servers=servers, port=chosen))
        super().__init__([binary, "-db", "-f", str(configuration)], port=chosen, log_path=self.directory / "output.log")

    @property
    def exchanges(self) -> list[Exchange]:
        """The finished exchanges, oldest first; one that still streams is not among them."""
        return [
            Exchange(method, int(status), (int(port),), path)
            for method, status, port, path in _EXCHANGE.findall(self.log)
        ]

    def wait_for_exchanges(self, count: int, timeout: float = 5) -> list[Exchange]:
        """Wait until so many exchanges are finished."""
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
