"""What the engine must still know after a restart and the registry does not say: one JSON file per base model.

The registry has the adapters and what each name means. This file has the rest: which older revisions are served
besides, which are pinned, what an operator has unloaded, and the next integer id, which is never given twice.
"""

import json
import logging
from pathlib import Path

import msgspec

from server.store.hashes import write_json

log = logging.getLogger("qloop.engine")

STATE_FORMAT = 1


class ServedRevision(msgspec.Struct, frozen=True):
    name: str
    revision: str
    is_current: bool
    is_pinned: bool


class AdapterState(msgspec.Struct, kw_only=True):
    """`unloaded` gives for a name that an operator unloaded what it meant then: a later publish serves it again."""

    format_version: int = STATE_FORMAT
    served: list[ServedRevision] = []
    unloaded: dict[str, str] = {}
    next_int_id: int = 1


class StateFile:
    """Without a path nothing outlives the process, for tests."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def read(self) -> AdapterState:
        """A file that is missing or damaged is only a loss of what it alone knew."""
        if self._path is None:
            return AdapterState()
        try:
            state = msgspec.json.decode(self._path.read_bytes(), type=AdapterState)
        except FileNotFoundError:
            return AdapterState()
        except (OSError, msgspec.DecodeError) as error:
            log.error("%s cannot be read (%s): adapters are served as the registry has them", self._path, error)
            return AdapterState()
        if state.format_version != STATE_FORMAT:
            log.error("%s has format %d, this release reads %d", self._path, state.format_version, STATE_FORMAT)
            return AdapterState()
        return state

    def write(self, state: AdapterState) -> None:
        """A full disk ends no engine: what it serves stays right, and the next change writes all of it again."""
        if self._path is None:
            return
        try:
            write_json(self._path, json.loads(msgspec.json.encode(state)))
        except OSError as error:
            log.error(
                "%s cannot be written (%s): a restart now would forget the latest pins, unloads and older revisions",
                self._path,
                error,
            )
