"""The shipped balancer configurations, run for real: only addresses and the folder of temporary files are rewritten."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.harness.balancer import Exchange, binary
from tests.harness.compose import compose, of
from tests.harness.pooler import PGBOUNCER
from tests.harness.processes import ServerProcess, accepts, free_ports
from tests.harness.waiting import wait_until

CONFIGURATIONS = ("nginx/round-robin.conf", "nginx/affinity.conf", "haproxy/round-robin.cfg", "haproxy/affinity.cfg")
WITH_AFFINITY = [name for name in CONFIGURATIONS if "affinity" in name]
_LOGGED = re.compile(r"\S+ ([A-Z]+) (\S+) (-?\d+) [-\d.]+ (\S+:\d+(?:, \S+:\d+)*|node-\d)$")


class Shipped(ServerProcess):
    """A shipped configuration before nodes.

    Args:
        name: one of ``CONFIGURATIONS``.
        ports: of the nodes, by their names.
        folder: for the configuration, the log and temporary files.
        text: what somebody has made of the configuration; empty: it is as shipped.
    """

    def __init__(self, name: str, ports: Mapping[str, int], folder: Path, text: str = "") -> None:
        self.ports = dict(ports)
        folder.mkdir(parents=True)
        [port] = free_ports(1)
        text = _moved(text or of(name).read_text(), ports, port, folder)
        path = folder / Path(name).name
        path.write_text(text)
        if name.startswith("nginx"):
            # As root, its workers would be another user, who may not look into a test's folder.
            user = " user root;" if os.geteuid() == 0 else ""
            command = [str(binary("nginx")), "-p", f"{folder}/", "-c", str(path), "-e", "error.log"]
            command += ["-g", f"daemon off;{user}"]
        else:
            command = [str(binary("haproxy")), "-db", "-f", str(path)]
        super().__init__(command, port=port, log_path=folder / "output.log")

    @property
    def exchanges(self) -> list[Exchange]:
        """The finished exchanges, in the order of their ends, with every node that was tried."""
        found = []
        for line in self.log.splitlines():
            if logged := _LOGGED.match(line):
                method, path, status, tried = logged.groups()
                # nginx logs addresses, haproxy the names of servers
                ports = (self.ports.get(one) or int(one.rpartition(":")[2]) for one in tried.split(", "))
                found.append(Exchange(method, int(status), tuple(ports), path))
        return found

    def answered_by(self, verb: str) -> list[str]:
        """The names of the nodes that answered exchanges with this method, in the order of their ends."""
        names = {port: name for name, port in self.ports.items()}
        return [names[exchange.ports[-1]] for exchange in self.exchanges if exchange.method == verb]


def _moved(text: str, ports: Mapping[str, int], port: int, folder: Path) -> str:
    for name, at in ports.items():
        text, count = re.subn(rf"\b{name}:8000\b", f"127.0.0.1:{at}", text)
        assert count, f"the configuration does not know {name}"
    text, count = re.subn(r"(listen |bind :)8080\b", lambda m: f"{m[1].rstrip(':')}127.0.0.1:{port}", text)
    assert count == 1
    return text.replace(" /tmp/", f" {folder}/")


@contextmanager
def pgbouncer(database: str) -> Iterator[int]:
    """The shipped pgbouncer with the passwords of the compose file, before a server where its user is made."""
    parts = urlsplit(database)
    [port] = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="pgmcp-test-"))  # another user must look into it
    users = folder / "userlist.txt"
    users.write_text(compose()["configs"]["userlist"]["content"])
    text = of("pgbouncer/pgbouncer.ini").read_text()
    for shipped, here in (
        ("host=postgres port=5432 dbname=pgmcp", f"host={parts.hostname} port={parts.port} dbname={parts.path[1:]}"),
        ("listen_addr = 0.0.0.0", "listen_addr = 127.0.0.1"),
        ("listen_port = 6432", f"listen_port = {port}"),
        ("/etc/pgbouncer/userlist.txt", str(users)),
    ):
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, here)
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(text)
    become: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        other = pwd.getpwnam("nobody")
        for path in (folder, users, configuration):
            os.chown(path, other.pw_uid, other.pw_gid)
        become = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
    process = subprocess.Popen([str(PGBOUNCER), "-q", str(configuration)], cwd="/", **become)
    try:
        wait_until(lambda: accepts(port), 10, "pgbouncer does not listen")
        yield port
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)
