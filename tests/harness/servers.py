"""PostgreSQL servers of a test's own: killed, started again on their ports, copied to standbys, promoted."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgmcp.embedded import binaries, bound_to_parent
from pgmcp.embedded.process import account_for
from tests.harness.cluster import tables_of
from tests.harness.processes import free_ports
from tests.harness.waiting import eventually, wait_until

# A killed server loses nothing that the operating system has: fsync may be off, synchronous_commit may not.
SETTINGS = {"fsync": "off", "shared_buffers": "32MB", "wal_keep_size": "256MB", "max_connections": "100"}
START = 20.0


class Site:
    """A folder for servers, and the account and the programs that they run with."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.account = account_for(home / "nobody's")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PG"))}
        self.env = {**kept, "LC_ALL": "C", "TZ": "UTC", "PGPASSWORD": secrets.token_urlsafe(12)}
        self.programs, _ = binaries.runnable(binaries.find(), self.account, home, self.env)
        self._count = 0

    def folder(self) -> Path:
        """A new folder that belongs to the account."""
        self._count += 1
        made = self.home / f"data-{self._count}"
        made.mkdir(mode=0o700)
        self.account.own(made)
        return made

    def run(self, program: str, *arguments: str | Path) -> None:
        """Run one of PostgreSQL's programs to its end."""
        self.account.run([self.programs / program, *arguments], self.env, START)


class Server:
    """One server, on a port that it keeps."""

    def __init__(self, site: Site, data: Path, port: int | None = None, **settings: str) -> None:
        self.site, self.data, self.settings = site, data, settings
        self.port = port or free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def fresh(cls, site: Site, **settings: str) -> Server:
        """A new, empty server; not started yet."""
        server = cls(site, site.folder(), None, **settings)
        handed = site.home / "password"
        handed.write_text(site.env["PGPASSWORD"])
        site.account.own(handed)
        login: list[str | Path] = ["-U", "postgres", "-A", "scram-sha-256", "--pwfile", handed]
        site.run("initdb", "-D", server.data, "-E", "UTF8", "--locale=C", "--no-sync", *login)
        return server

    def standby(self, name: str, port: int | None = None, **settings: str) -> Server:
        """A copy that follows this server; not started yet."""
        copy = Server(self.site, self.site.folder(), port, **settings)
        self.site.run(
            "pg_basebackup", "-D", copy.data, "-R", "--no-sync", "-c", "fast",
            "-d", f"host=127.0.0.1 port={self.port} user=postgres application_name={name}",
        )  # fmt: skip
        return copy

    def url(self, *others: int) -> str:
        """The superuser's address of this server, or of it and others on these ports."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in (self.port, *others))
        return f"postgresql://postgres:{self.site.env['PGPASSWORD']}@{hosts}/postgres"

    @property
    def log(self) -> str:
        """What the server has said."""
        return self.data.with_suffix(".log").read_text(errors="replace")

    def start(self, *, wait: bool = True) -> None:
        """Start the server; wait until it takes connections."""
        settings = SETTINGS | self.settings | {"listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        options = [part for item in settings.items() for part in ("-c", "=".join(item))]
        with self.data.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.site.programs / "postgres", "-D", self.data, "-p", str(self.port), *options],
                cwd="/",
                env=self.site.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=bound_to_parent(signal.SIGINT),  # noqa: PLW1509 - only system calls
                start_new_session=True,
                **self.site.account.arguments,
            )
        if wait:
            wait_until(lambda: self.state == "ready", START, lambda: f"PostgreSQL starts: {self.log}")

    @property
    def state(self) -> str:
        """What the server's pid file says: ``ready``, or something else while it starts."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return ""
        ours = self._process is not None and lines[:1] == [str(self._process.pid)]
        return lines[7].strip() if ours and len(lines) > 7 else ""

    def crash(self) -> None:
        """Stop at once, without a checkpoint (pg_ctl's "immediate")."""
        self._end(signal.SIGQUIT)

    def kill(self) -> None:
        """Kill every process of the server."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._end(signal.SIGKILL)
        for child in children:
            try:
                os.kill(int(child), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def stop(self) -> None:
        """Stop in an orderly way, with a checkpoint, whatever clients do."""
        if self._process is not None:
            self._end(signal.SIGINT)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            try:
                process.wait(START)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def has_all_of(self, primary: Server) -> None:
        """Wait until this standby has replayed what the primary has."""
        async with tables_of(primary.url()) as tables, tables_of(self.url()) as copy:
            reached = await tables.value("select pg_current_wal_lsn()")
            await eventually(
                lambda: copy.value("select pg_last_wal_replay_lsn() >= $1", reached), "the standby has it all"
            )

    async def detach(self) -> None:
        """From now on this standby hears nothing of its primary's commits."""
        async with tables_of(self.url()) as copy:
            await copy.execute("alter system set primary_conninfo = ''")
            await copy.value("select pg_reload_conf()")
            await eventually(lambda: copy.value("select count(*) = 0 from pg_stat_wal_receiver"), "it is detached")

    def promote(self) -> None:
        """Make a standby the primary; returns when it is."""
        self.site.run("pg_ctl", "promote", "-D", self.data, "-w")


@contextmanager
def site() -> Iterator[Site]:
    """A folder for servers that the server's account can reach; it goes in the end."""
    memory = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="pgmcp-servers-", dir=memory if os.access(memory, os.W_OK) else None))
    home.chmod(0o711)
    try:
        yield Site(home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
