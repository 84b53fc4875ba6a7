"""The target of ``calls.py``: one tool that returns its argument.

Run by itself (``python benchmarks/echo.py --port PORT --response sse|json``) it is the SDK's own server, unchanged.
"""

from __future__ import annotations

import argparse

import uvicorn
from mcp.server.mcpserver import MCPServer

mcp = MCPServer("echo", log_level="WARNING")


@mcp.tool()
async def echo(text: str) -> str:
    """Return the text."""
    return text


def main() -> None:
    """Serve the SDK's application as ``pgmcp serve`` serves its own: uvicorn, uvloop, httptools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--response", choices=("sse", "json"), default="sse")
    given = parser.parse_args()
    uvicorn.run(
        mcp.streamable_http_app(json_response=given.response == "json"),
        port=given.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
