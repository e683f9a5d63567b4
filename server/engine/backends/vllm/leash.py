"""Ties the processes that vLLM starts to the one that started them, so that a kill -9 leaves none with the device.

vLLM's workers notice that their engine core is gone, but its engine core does not notice that we are.
"""

import os
import signal
from typing import Any

from server.ops.process import die_with_parent


class Leash(dict[str, Any]):
    """vLLM's `additional_config` with the same entries. It is pickled into every process that vLLM spawns, and when
    it arrives there that process asks the kernel to be killed together with its parent.

    Linux means the parent's thread: the thread that starts vLLM must live as long as the process.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _tie, (os.getpid(), dict(self))


def _tie(sender_pid: int, entries: dict[str, Any]) -> Leash:
    if os.getppid() == sender_pid:  # else a copy within a process, or a process that Ray started
        die_with_parent(sender_pid, signal.SIGKILL)
    return Leash(entries)
