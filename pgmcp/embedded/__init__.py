"""A private PostgreSQL for trials and tests, run from binaries that somebody else has packed."""

from pgmcp.embedded.process import bound_to_parent, free_port
from pgmcp.embedded.server import EmbeddedPostgres

__all__ = ["EmbeddedPostgres", "bound_to_parent", "free_port"]
