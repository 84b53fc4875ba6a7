"""The server of the tests of deploys in somebody else's ASGI server: ``uvicorn tests.harness.foreign:app``."""

from pgmcp import Cluster
from tests.harness.deploys import mcp

app = Cluster().app(mcp)
