"""The composition root: everything that makes a node, put together and run."""

from pgmcp.node.incarnation import Incarnation
from pgmcp.node.node import Node
from pgmcp.node.own_name import host_name
from pgmcp.node.server import KEEP_ALIVE_SECONDS, own_sockets, serve, shared_socket

__all__ = ["KEEP_ALIVE_SECONDS", "Incarnation", "Node", "host_name", "own_sockets", "serve", "shared_socket"]
