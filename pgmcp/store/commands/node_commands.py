"""Commands to nodes, written into their rows; a node looks at its own every ``poll`` seconds."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from pgmcp.clock import Clock
from pgmcp.errors import NodeUnknown, PgmcpError, SettingsError
from pgmcp.store.connection.one_shot import checked, connect, finish
from pgmcp.store.statements import statement
from pgmcp.types import NodeState

LIMIT_SECONDS = 10.0
"""Seconds that giving a command may take."""

LOOK_SECONDS = 0.2
OVER = frozenset({NodeState.LEFT, NodeState.DEAD})


@dataclass(frozen=True, slots=True)
class CommandedNode:
    """A node that was told to leave, and how far it is."""

    node_id: str
    node_name: str
    state: NodeState


def drain(database_url: str, schema: str, node: str, *, wait: float) -> CommandedNode:
    """Tell a node to leave; call it outside any event loop. A repeat waits for the same end.

    Args:
        node: its name or id.
        wait: seconds to wait until it has left; 0 to return at once.

    Returns:
        The node and its state: ``left``, or ``draining`` when that was not waited for.

    Raises:
        NodeUnknown: nobody is called so; or it is only joining, it died, or it has not left in time.
        SettingsError: several living nodes have the name; the message lists their ids.
        DatabaseUnavailable: no answer.
    """
    checked(schema)

    async def command() -> CommandedNode:
        clock, connection = Clock(), await connect(database_url)
        try:
            found = await _find(connection, schema, node)
            await connection.fetch(statement("drain_node", schema), found["node_id"], timeout=LIMIT_SECONDS)
            end = clock.boottime() + wait
            while True:
                state = await connection.fetchval(
                    statement("own_state", schema), found["node_id"], timeout=LIMIT_SECONDS
                )
                commanded = CommandedNode(str(found["node_id"]), found["name"], NodeState(state or NodeState.LEFT))
                if commanded.state in OVER or wait == 0 or clock.boottime() >= end:
                    return commanded
                await clock.sleep(LOOK_SECONDS)
        finally:
            connection.terminate()

    commanded = finish(command, database_url, LIMIT_SECONDS + wait)
    problem = _problem(commanded, wait)
    if problem:
        raise PgmcpError(problem)
    return commanded


async def _find(connection: asyncpg.Connection, schema: str, node: str) -> asyncpg.Record:
    rows = await connection.fetch(statement("nodes_called", schema), node, timeout=LIMIT_SECONDS)
    if not rows:
        message = f"No living node is called {node}. `pgmcp nodes` lists them."
        raise NodeUnknown(message)
    if len(rows) > 1:
        ids = "\n".join(f"  {row['node_id']}  {row['state']}  {row['address']}" for row in rows)
        message = f"{len(rows)} living nodes are called {node}. Give the id of one of them:\n{ids}"
        raise SettingsError(message)
    return rows[0]


def _problem(commanded: CommandedNode, wait: float) -> str:
    who = f"Node {commanded.node_name} ({commanded.node_id})"
    match commanded.state:
        case NodeState.DEAD:
            return f"{who} is dead and cannot drain: the others take its sessions over."
        case NodeState.JOINING | NodeState.READY:
            return f"{who} is joining. Run the command again when it is ready."
        case NodeState.DRAINING if wait:
            return f"{who} still drains after {wait:g} s; it goes on. Run the command again to wait longer."
    return ""
