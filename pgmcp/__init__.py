"""Run an unchanged MCP server on many nodes, with PostgreSQL as the only coordinator."""

__version__ = "0.1.0"
