"""Addresses with TLS, and addresses and passwords that lie in files and change while nodes run."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import secrets
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pgmcp.cli import main
from pgmcp.clock import Clock
from pgmcp.errors import DatabaseUnavailable, SettingsError
from pgmcp.settings import Settings
from pgmcp.store.connection.address import current, place
from pgmcp.store.database import Database
from tests.harness.clients import RawSession
from tests.harness.cluster import cluster, everything
from tests.harness.waiting import eventually

BOUND = 20
SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
NOWHERE = Path("/nowhere")
Certified = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def certified(name: str, authority: Certified | None = None) -> Certified:
    """A certificate for 127.0.0.1, by itself or by an authority."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = (authority[0].subject, authority[1]) if authority else (subject, key)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )
    return made.sign(signer, hashes.SHA256()), key


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Secured:
    """TLS before the run's PostgreSQL, whose own binaries have none: what does not begin with TLS is hung up on.

    Args:
        url: of the database behind it.
        folder: for the certificates: of the authority that it has, and of another one.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._behind, self.secured = urlsplit(url), 0
        authority = certified("authority")
        certificate, key = certified("server", authority)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / "server.pem").write_bytes(private + pem(certificate))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem")
        self.authority, self.stranger = folder / "authority.crt", folder / "stranger.crt"
        self.authority.write_bytes(pem(authority[0]))
        self.stranger.write_bytes(pem(certified("stranger")[0]))
        self.port = 0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection."""
        try:
            if await reader.readexactly(8) != SSL_REQUEST:
                return
            writer.write(b"S")
            await writer.start_tls(self._context)
            self.secured += 1
            inner = await asyncio.open_connection(self._behind.hostname, self._behind.port)
            ways = [asyncio.create_task(_pass(reader, inner[1])), asyncio.create_task(_pass(inner[0], writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            inner[1].transport.abort()
        except (OSError, asyncio.IncompleteReadError):
            pass  # a client that trusts nobody
        finally:
            writer.transport.abort()

    def address(self, *, root: Path | None = None, host: str = "127.0.0.1", query: str = "sslmode=verify-full") -> str:
        """The database's address through it."""
        user = self._behind.netloc.rpartition("@")[0]
        named = f"&sslrootcert={quote(str(root or self.authority))}" if root is not NOWHERE else ""
        return self._behind._replace(netloc=f"{user}@{host}:{self.port}", query=query + named).geturl()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()


@pytest.fixture
async def secured(empty_database: str, tmp_path: Path) -> AsyncIterator[Secured]:
    made = Secured(empty_database, tmp_path)
    server = await asyncio.start_server(made.take, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()


def run(*words: str, **env: str) -> Any:
    return CliRunner().invoke(main, words, env=env)


async def test_all_connections_of_nodes_and_commands_verify_the_server(secured: Secured) -> None:
    url = secured.address()
    upgraded = await asyncio.to_thread(run, "db", "upgrade", "--database-url", url)
    assert upgraded.exit_code == 0, upgraded.output
    async with cluster(url, everything, 1) as (node,), RawSession() as session:
        before = secured.secured
        assert before >= 5, "the migration's, the line and the pool"
        await session.open(node.url)
        await session.call_tool(node.url, "count")
        listed = await asyncio.to_thread(run, "nodes", "--json", "--database-url", url)
        assert '"n1"' in listed.output
        assert secured.secured > before
    mode = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": str(secured.authority)}
    bare = secured.address(root=NOWHERE, query="")
    assert (await asyncio.to_thread(run, "db", "current", "--database-url", bare, **mode)).exit_code == 0
    assert (await asyncio.to_thread(run, "db", "current", "--database-url", bare, PGSSLMODE="disable")).exit_code == 3


@pytest.mark.parametrize("wrong", ["authority", "host", "no file", "no authority"])
async def test_a_server_that_cannot_be_verified_is_refused_with_a_reason(
    secured: Secured, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.postgresql/root.crt
    url, reason = {
        "authority": (secured.address(root=secured.stranger), "its certificate is refused"),
        "host": (secured.address(host="localhost"), "its certificate is refused"),
        "no file": (secured.address(root=tmp_path / "none.crt"), f"the file {tmp_path / 'none.crt'} of sslrootcert"),
        "no authority": (secured.address(root=NOWHERE), "name the authority's in sslrootcert"),
    }[wrong]
    password = str(urlsplit(url).password)
    for words in (("db", "upgrade"), ("db", "check"), ("nodes",), ("drain", "n1")):
        done = await asyncio.to_thread(run, *words, "--database-url", url)
        assert done.exit_code == 3, (words, done.output)
        assert reason in done.output
        assert password not in done.output
    database = Database(Settings(database_url=url), Clock())
    with pytest.raises(DatabaseUnavailable, match=reason):
        await database.open()
    await database.close()


# passwords that change


@pytest.fixture
async def hand(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
async def role(hand: asyncpg.Connection) -> AsyncIterator[str]:
    name = f"rotates_{secrets.token_hex(4)}"
    await hand.execute(f"create role {name} login superuser password 'first'")
    yield name
    await hand.execute(f"drop role {name}")


def by_file(url: str, folder: Path) -> tuple[dict[str, str], Callable[[str], None]]:
    path, at = folder / "url", urlsplit(url)

    def write(password: str) -> None:
        anew = folder / "anew"
        anew.write_text(at._replace(netloc=f"{at.username}:{password}@{at.hostname}:{at.port}").geturl() + "\n")
        anew.rename(path)

    return {"database_url_file": str(path)}, write


def by_passfile(url: str, folder: Path) -> tuple[dict[str, str], Callable[[str], None]]:
    path, at = folder / "pgpass", urlsplit(url)

    def write(password: str) -> None:
        path.touch(0o600)
        path.write_text(f"*:*:*:{at.username}:{password}\n")

    bare = at._replace(netloc=f"{at.username}@{at.hostname}:{at.port}").geturl()
    return {"database_url": f"{bare}?passfile={quote(str(path))}"}, write


@pytest.mark.parametrize("way", [by_file, by_passfile])
async def test_a_password_changes_without_a_restart(
    database: str, hand: asyncpg.Connection, role: str, tmp_path: Path, way: Any
) -> None:
    at = urlsplit(database)
    given, write = way(at._replace(netloc=f"{role}@{at.hostname}:{at.port}").geturl(), tmp_path)
    write("first")
    url, files = given.get("database_url", ""), {key: value for key, value in given.items() if key != "database_url"}
    async with cluster(url, everything, 1, **files) as (node,), RawSession() as session:
        await session.open(node.url)
        await hand.execute(f"alter role {role} password 'second'")
        write("second")
        cut = await hand.fetchval(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = $1", role
        )
        assert cut >= 2, "the line and the pool"
        assert (await session.call_tool(node.url, "count", BOUND))["structuredContent"] == {"result": 1}
        line = "select count(*) from pg_stat_activity where usename = $1 and application_name like '% line'"
        await eventually(lambda: hand.fetchval(line, role), "the line is open again", BOUND)
        command = ("nodes", "--json", *(word for name, value in given.items() for word in (_option(name), value)))
        assert '"n1"' in (await asyncio.to_thread(run, *command)).output


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_an_address_is_given_once() -> None:
    with pytest.raises(SettingsError, match="--database-url or --database-url-file, not both"):
        Settings(database_url="postgresql://a/b", database_url_file="/x")
    with pytest.raises(SettingsError, match="--listen-url or --listen-url-file, not both"):
        Settings(listen_url="postgresql://a/b", listen_url_file="/x")
    assert Settings(database_url_file="/x", listen_url_file="/y").line_url == "file:/y"
    both = run("db", "current", "--database-url", "postgresql://a/b", "--database-url-file", "/x")
    assert both.exit_code == 2
    assert "not both" in both.output
    assert run("db", "current").exit_code == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for path in (tmp_path / "none", empty):
        for words in (("db", "upgrade"), ("nodes",), ("drain", "n1")):
            done = run(*words, "--database-url-file", str(path))
            assert done.exit_code == 2, done.output
            assert str(path) in done.output
        assert place(f"file:{path}") == f"PostgreSQL at the address in {path}"
    empty.write_text(" postgresql://me:secret@there/db\n")
    assert current(f"file:{empty}") == "postgresql://me:secret@there/db"
    assert place(f"file:{empty}") == "PostgreSQL at there/db"
