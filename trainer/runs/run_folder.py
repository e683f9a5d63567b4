"""A run's folder: `run.json` (what it is and how it goes), metrics, events, sample answers, checkpoints, the result.

One process owns a running run and holds its lock; everyone else only reads. Imports neither torch nor matplotlib.
"""

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from server.errors import ConfigError
from server.store.hashes import write_json, write_text
from server.store.model_folder import read_json_object

RUN_FORMAT = 1
RECORD, LOCK = "run.json", ".lock"
METRICS, EVENTS, SAMPLES = "metrics.jsonl", "events.jsonl", "samples.jsonl"
State = Literal["running", "done", "failed", "stopped"]


class RunFolder:
    """`writes` is False in all but the first process of a run: there, what would be written is dropped."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self._lock: int | None = None
        self._record = self._read()

    def _read(self) -> dict[str, Any]:
        return read_json_object(self.path / RECORD) if (self.path / RECORD).is_file() else {}

    @property
    def id(self) -> str:
        return str(self._record.get("id", self.path.name))

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def lock(self) -> None:
        """Own the run until the process ends. Raises ConfigError when another process does."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # A record lock dies with its process, however that ends, and no forked child inherits it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.unlock()
            raise ConfigError(
                f"run {self.id} is being trained by process {self._record.get('pid', '?')}; wait for it or stop it, or "
                "start a second run with another run_id and resume=never"
            ) from None
        self._record = self._read()  # its last owner may have written since

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def start(self, **facts: Any) -> None:
        """Running, in this process."""
        self._record.pop("error", None)
        self._record.pop("ended", None)
        self.record(
            format_version=RUN_FORMAT,
            id=self.id,
            state="running",
            pid=os.getpid(),
            pid_started=_started(os.getpid()),
            started=self._record.get("started", int(time.time())),
            **facts,
        )

    def record(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self._record |= facts
        if self._writes:
            write_json(self.path / RECORD, self._record)

    def finish(self, state: State, **facts: Any) -> None:
        self.record(state=state, ended=int(time.time()), **facts)
        self.append_event(state, **facts)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        self._append(METRICS, metrics)

    def append_event(self, event: str, **facts: Any) -> None:
        self._append(EVENTS, {"time": round(time.time(), 3), "event": event, **facts})

    def append_sample(self, sample: Mapping[str, Any]) -> None:
        self._append(SAMPLES, sample)

    def forget_after(self, step: int) -> None:
        """Drop the metrics and sample answers of later steps, which are about to be made again, and torn lines."""
        if self._writes:
            for name in (METRICS, SAMPLES):
                kept = [line for line in read_lines(self.path / name) if line.get("step", 0) <= step]
                if (self.path / name).exists():
                    write_text(self.path / name, "".join(_line(line) for line in kept))

    def _append(self, name: str, value: Mapping[str, Any]) -> None:
        if self._writes:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(_line(value))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a run's .jsonl file; a line that a kill has torn is left out, a missing file is empty."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # JSON lets U+2028 stand
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_run(path: Path) -> dict[str, Any]:
    """A run's record. Raises ConfigError when `path` is no run folder."""
    if not (path / RECORD).is_file():
        raise ConfigError(f"{path}: no run.json, so this is not a run folder")
    return read_json_object(path / RECORD)


def run_state(record: Mapping[str, Any]) -> str:
    """The record's state; `killed` when it says running and its process is gone."""
    state, pid = str(record.get("state", "")), record.get("pid")
    if state == "running" and not (isinstance(pid, int) and _is_alive(pid, record.get("pid_started"))):
        return "killed"
    return state


def list_runs(runs: Path) -> list[dict[str, Any]]:
    """The records of all runs, oldest first, with their folder as `path` and their real `state`."""
    found = []
    for file in runs.glob(f"*/{RECORD}"):
        record = read_json_object(file)
        found.append({**record, "path": str(file.parent), "state": run_state(record)})
    return sorted(found, key=lambda record: (record.get("started", 0), record["path"]))


def _line(value: Mapping[str, Any]) -> str:
    """One line of strict JSON, which has no NaN: such a number becomes the text "nan", "inf" or "-inf"."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _is_alive(pid: int, started: object) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return started is None or started == _started(pid)


def _started(pid: int) -> int | None:
    """The process' start, in clock ticks since boot: in a container the same pid comes again and again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
