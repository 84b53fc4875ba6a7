"""Keys that lie wrapped in the database: nodes that can unwrap them start, others say what they lack."""

from __future__ import annotations

import secrets
from pathlib import Path

import asyncpg

from tests.harness.processes import NodeProcess, free_ports

KEY, OTHER = secrets.token_hex(32), secrets.token_hex(32)


async def test_only_nodes_with_the_secrets_key_start(database: str, tmp_path: Path) -> None:
    file = tmp_path / "secrets-key"
    file.write_text(f"{KEY}\n")
    ports = iter(free_ports(4))

    def node(name: str, **env: str) -> NodeProcess:
        return NodeProcess(
            "examples/quickstart.py:mcp", database_url=database, name=name, port=next(ports), log_dir=tmp_path, env=env
        )

    with (
        node("by-file", PGMCP_SECRETS_KEY_FILE=str(file)) as first,
        node("by-variable", PGMCP_SECRETS_KEY=KEY) as second,
    ):
        for wrong in (node("without"), node("with-another", PGMCP_SECRETS_KEY=OTHER)):
            assert wrong.start().wait() == 2, wrong.log
            assert "wrapped with the secrets key" in wrong.log
            assert "Traceback" not in wrong.log
            assert OTHER not in wrong.log
        assert KEY not in first.log + second.log
    connection = await asyncpg.connect(database)
    try:
        rows = await connection.fetch("select purpose, wrapped_by from pgmcp.secrets")
    finally:
        await connection.close()
    assert {row["purpose"] for row in rows} == {"context", "request-state"}
    assert all(row["wrapped_by"] for row in rows)
