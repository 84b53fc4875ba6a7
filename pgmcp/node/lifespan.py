"""The lifespan of the served server, whose errors are the user's and are told as such.

Failure handling: one that fails at its start ends the node's start; one that fails at its end is logged, and the node
ends in order.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from pgmcp.errors import LifespanFailed, PgmcpError

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def running(lifespan: AbstractAsyncContextManager[Any]) -> AsyncIterator[None]:
    """Run the served server's lifespan.

    Raises:
        LifespanFailed: it raised an error at its start; the message says which, and where.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(lifespan)
        except PgmcpError:
            raise
        except (Exception, SystemExit) as error:
            logger.error("the lifespan of the served server failed at its start", exc_info=error)
            message = f"The lifespan of the served server failed: {_described(error)}."
            raise LifespanFailed(message) from error
        try:
            yield
        finally:
            try:
                await stack.aclose()
            except (Exception, SystemExit) as error:
                logger.error(
                    "the lifespan of the served server failed at its end: %s", _described(error), exc_info=error
                )


def _described(error: BaseException) -> str:
    """What was raised, and where: the last line of the user's own code."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _installed(frame.filename)]
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    where = f" ({own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""
    return f"{what.rstrip('.')}{where}"


def _installed(path: str) -> bool:
    """Whether a file belongs to a library, to Python or to pgmcp."""
    folders = (Path(traceback.__file__).parent, Path(__file__).parents[1])
    return "site-packages" in path or path.startswith(tuple(f"{folder}/" for folder in folders))
