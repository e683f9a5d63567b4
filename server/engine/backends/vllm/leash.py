"""Ties the processes that vLLM starts to the one that started them, so that a kill -9 leaves none with the device.

vLLM's workers notice that their engine core is gone, but its engine core does not notice that we are.
"""

import os
import signal
from collections.abc import Mapping
from typing import Any

from server.ops.process import die_with_parent


class Leash(dict[str, Any]):
    """vLLM's `additional_config` with the same entries. It is pickled into every process that vLLM spawns, and when
    it arrives there that process asks the kernel to be killed together with its parent.

    Linux means the parent's thread: the thread that starts vLLM must live as long as the process.

    `niceness`: of those processes. On a CPU their threads spin on every core, and HTTP workers would wait for seconds.
    """

    def __init__(self, entries: Mapping[str, Any], niceness: int = 0) -> None:
        super().__init__(entries)
        self.niceness = niceness

    def __reduce__(self) -> tuple[Any, ...]:
        return _tie, (os.getpid(), dict(self), self.niceness)


def _tie(sender_pid: int, entries: dict[str, Any], niceness: int) -> Leash:
    if os.getppid() == sender_pid:  # else a copy within a process, or a process that Ray started
        die_with_parent(sender_pid, signal.SIGKILL)
        os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    return Leash(entries, niceness)
