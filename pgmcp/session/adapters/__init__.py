"""Adapters: one module for each kind of MCP server that can be served."""
