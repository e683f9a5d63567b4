"""SIGTERM and Ctrl-C: inside the training loop the step is finished and saved first; elsewhere they stop at once.

Knows no trainer: a callback looks at `requested` after each step.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, ClassVar

from trainer.errors import EXIT_INTERRUPTED, Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Stopped):
    """Stopped by Ctrl-C."""

    exit_code: ClassVar[int] = EXIT_INTERRUPTED


class StopSignals:
    """Handles both signals while it is entered. `is_training` is set by the loop's owner."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.is_training = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread do this
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def error(self, text: str) -> Stopped:
        """The exception that ends the command with the signal's exit code."""
        return Interrupted(text) if self.requested == signal.SIGINT else Stopped(text)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None
        self.requested = signal.Signals(number)
        if self.is_training and not again:
            # print() may not be entered twice; a handler can run inside it.
            os.write(2, b"\nstopping: this step is finished and saved first; once more stops at once\n")
            return
        raise self.error(f"stopped at once by {self.requested.name}; the same command goes on from the last checkpoint")
