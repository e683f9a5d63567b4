"""What an engine that does not answer yet is doing: a small file beside its socket, for `/readyz`.

There is no socket before the model is loaded, so a file has to do. It is touched while the work goes on; one that has
grown old was left by an engine that died.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from server.store.hashes import write_text

STALE_S = 30.0  # an import of a large library can hold a process for many seconds


class LoadPhase(msgspec.Struct):
    phase: str
    number: int  # of the phases begun so far
    begun: float  # unix seconds, of the load
    entered: float  # of this phase


@dataclass
class LoadReport:
    """The engine's side: `enter` each phase, `keep` while one goes on, `leave` at the end."""

    path: Path
    _begun: float = 0.0
    _number: int = 0

    def enter(self, phase: str) -> None:
        now = time.time()
        self._begun = self._begun or now
        self._number += 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, msgspec.json.encode(LoadPhase(phase, self._number, self._begun, now)).decode())

    def keep(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path)

    def leave(self) -> None:
        self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def loading(self) -> Iterator["LoadReport"]:
        """Left however the load ends."""
        try:
            yield self
        finally:
            self.leave()


def phase_path(socket_path: Path) -> Path:
    return socket_path.with_suffix(".loading")


def read_phase(path: Path) -> LoadPhase | None:
    """None where no engine loads."""
    try:
        if time.time() - path.stat().st_mtime > STALE_S:
            return None
        return msgspec.json.decode(path.read_bytes(), type=LoadPhase)
    except (OSError, msgspec.DecodeError):
        return None
