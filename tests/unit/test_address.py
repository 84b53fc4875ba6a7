"""The database's address, with one server or several."""

from __future__ import annotations

import pytest

from pgmcp.store.connection.address import place, servers

WANTS = "target_session_attrs=read-write"


@pytest.mark.parametrize(
    ("url", "each"),
    [
        ("postgresql://u:p@a:1,b:2/db", [f"postgresql://u:p@a:1/db?{WANTS}", f"postgresql://u:p@b:2/db?{WANTS}"]),
        ("postgresql://a,b", [f"postgresql://a?{WANTS}", f"postgresql://b?{WANTS}"]),
        (
            "postgresql://u@a,b/db?target_session_attrs=any&sslmode=require",
            [f"postgresql://u@{host}/db?target_session_attrs=any&sslmode=require" for host in "ab"],
        ),
        ("postgresql:///db?host=a,b&port=1,2", [f"postgresql://a:1/db?{WANTS}", f"postgresql://b:2/db?{WANTS}"]),
        ("postgresql:///db?host=a,b&port=7", [f"postgresql://a:7/db?{WANTS}", f"postgresql://b:7/db?{WANTS}"]),
        (
            "postgresql://[::1]:1,[::2]/db",
            [f"postgresql://[::1]:1/db?{WANTS}", f"postgresql://[::2]/db?{WANTS}"],
        ),
        (
            "postgresql:///db?host=/run/a,b",
            [f"postgresql:///db?{WANTS}&host=%2Frun%2Fa&port=5432", f"postgresql://b/db?{WANTS}"],
        ),
        ("postgresql://u:p%2C@a/db", None),
        ("postgresql:///db?host=/run/postgresql", None),
        ("postgresql://a,b/db?port=1,2,3", None),
        ("postgresql://a,,b/db", None),
        ("", None),
    ],
)
def test_each_server_has_an_address_of_its_own(url: str, each: list[str] | None) -> None:
    assert servers(url) == (each or [url])


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql://u:secret@a:1,b:2/db?password=secret", "a:1,b:2/db"),
        ("postgresql:///db?user=u&password=secret&host=a,b", "a,b/db"),
        ("postgresql://u:se/secret@a:1/db", "a:1/db"),
        ("postgresql://u:se?secret@a:1/db", "a:1/db"),
        ("postgresql://u:se/secret@a:1,b:2/db?x=y", "a:1,b:2/db"),
        ("postgresql://a/db?password=p@secret", "a/db"),
        ("postgresql://u:secret/db", "the given address"),
        ("host=h password=secret dbname=db", "the given address"),
        ("postgresql://", "the default place"),
        ("postgresql:///db", "db"),
    ],
)
def test_a_message_names_the_servers_and_no_password(url: str, where: str) -> None:
    assert place(url) == f"PostgreSQL at {where}"
