"""A real nginx that spreads requests over nodes in turn, with no stickiness of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.harness.balancer import Balancer, Exchange

# ``proxy_next_upstream`` without ``non_idempotent``: another node is tried when the first refuses the connection,
# but a POST that was sent once is never repeated. ``max_fails=0``: a node is never skipped for past failures.
# With ``plain`` nothing is set but what HTTP/1.1 needs: a connection for each request, and a node that refused one is
# skipped for ten seconds (``skips``).
_CONFIGURATION = """
master_process off;
daemon off;
pid nginx.pid;
error_log error.log warn;
events {{ worker_connections 4096; }}
http {{
  log_format exchange '$request_method $status $upstream_addr $uri';
  access_log access.log exchange;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  client_max_body_size 16m;
  upstream nodes {{
{servers}
{keepalive}
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://nodes;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto $scheme;
{tuned}
    }}
  }}
}}
"""


_TUNED = """
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_cache off;
      proxy_connect_timeout 2s;
      proxy_read_timeout 1h;
      proxy_send_timeout 1h;
      proxy_next_upstream error timeout;
"""


class Nginx(Balancer):
    """nginx in front of ports of 127.0.0.1, on a port and in a folder of its own."""

    def __init__(
        self,
        ports: Sequence[int],
        *,
        plain: bool = False,
        skips: int = 10,
        port: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self._plain, self._skips = plain, skips
        super().__init__("nginx", "nginx-light", ports, port, directory)

    def configure(self, port: int) -> list[str]:
        how = f" fail_timeout={self._skips}s" if self._plain else " max_fails=0"
        servers = "\n".join(f"    server 127.0.0.1:{one}{how};" for one in self.ports)
        configuration = self.directory / "nginx.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                servers=servers,
                port=port,
                keepalive="" if self._plain else "    keepalive 64;",
                tuned="" if self._plain else _TUNED,
            )
        )
        return ["-p", f"{self.directory}/", "-c", str(configuration), "-e", "error.log"]

    @property
    def exchanges(self) -> list[Exchange]:
        path = self.directory / "access.log"
        return [_exchange(line) for line in path.read_text().splitlines()] if path.exists() else []


def _exchange(line: str) -> Exchange:
    method, status, rest = line.split(" ", 2)
    upstreams, path = rest.rsplit(" ", 1)
    ports = tuple(int(one.rpartition(":")[2]) for one in upstreams.replace(" ", "").split(",") if ":" in one)
    return Exchange(method, int(status), ports, path)
