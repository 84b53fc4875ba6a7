"""Expand: views show an alias of what addresses an HTTP+SSE session.

Revision ID: 0018
Revises: 0016
"""

from pathlib import Path

from alembic import context, op

revision = "0018"
down_revision = "0016"
branch_labels = None
depends_on = None

# Of the same shape as the ids that nodes make, with the same hint, and as good for telling sessions apart.
ALIAS = "left(s.session_id, -32) || left(encode(sha256(convert_to(s.session_id, 'UTF8')), 'hex'), 32)"
SHOWN = f"case when s.transport = 'sse' and s.session_id ~ '-[0-9a-f]{{32}}$' then {ALIAS} else s.session_id end"


def upgrade() -> None:
    _create_views(SHOWN)


def downgrade() -> None:
    _create_views("s.session_id")


def _create_views(session_id: str) -> None:
    schema: str = context.config.attributes["schema"]
    text = Path(__file__).with_name("0018_views.sql").read_text(encoding="utf-8")
    for statement in text.replace("{session_id}", session_id).replace("{schema}", schema).split(";\n"):
        if statement.strip():
            op.execute(statement.strip())
