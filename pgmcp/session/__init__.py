"""The live server session on its owner: actor, adapters to MCP servers, identity of the caller."""
