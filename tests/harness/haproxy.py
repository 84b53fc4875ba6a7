"""A real haproxy that spreads requests over nodes in turn, with no stickiness of any kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tests.harness.balancer import Balancer, Exchange

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


class Haproxy(Balancer):
    """haproxy in front of ports of 127.0.0.1, on a port and in a folder of its own."""

    def __init__(self, ports: Sequence[int], *, port: int | None = None, directory: Path | None = None) -> None:
        super().__init__("haproxy", "haproxy", ports, port, directory)

    def configure(self, port: int) -> list[str]:
        servers = "\n".join(f"  server port-{one} 127.0.0.1:{one}" for one in self.ports)
        configuration = self.directory / "haproxy.cfg"
        configuration.write_text(_CONFIGURATION.format(servers=servers, port=port))
        return ["-db", "-f", str(configuration)]

    @property
    def exchanges(self) -> list[Exchange]:
        return [
            Exchange(method, int(status), (int(port),), path)
            for method, status, port, path in _EXCHANGE.findall(self.log)
        ]
