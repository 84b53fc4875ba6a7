"""The smallest useful server: ``pgmcp up examples/quickstart.py:mcp``."""

from mcp.server.mcpserver import Context, MCPServer

mcp = MCPServer("quickstart")


@mcp.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@mcp.tool()
async def spell(word: str, ctx: Context) -> str:
    """Spell a word, one progress report per letter."""
    for position, letter in enumerate(word, start=1):
        await ctx.report_progress(position, len(word), letter)
    return "-".join(word)
