"""Python 3.12's eager tasks, for 3.11: run first, become a task only when there is something to wait for."""

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any


def run_now(coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None] | None":
    """Run a coroutine until it first waits. None: it is done and needed no task. Raises what it raised."""
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return None
    return asyncio.get_running_loop().create_task(_rest(coroutine, awaited))


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """What is left of a coroutine that waits for `awaited`."""
    try:
        while True:
            try:
                value = yield awaited
            except BaseException as error:  # a cancellation is the coroutine's to handle
                awaited = coroutine.throw(error)
            else:
                awaited = coroutine.send(value)
    except StopIteration:
        return
