"""A run's folder: `run.json` (what and how it goes), `metrics.jsonl`, `rejects.jsonl` (the ledger), then the result."""

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from server.errors import ConfigError
from server.store.hashes import write_json, write_text
from server.store.model_folder import read_json_object
from server.store.names import NameRefused, check_name
from trainer.config import TrainConfig
from trainer.formats import Reject

RUN_FORMAT = 1
State = Literal["running", "done", "failed", "stopped"]


class RunFolder:
    """Owned by the one process that trains; others only read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record: dict[str, Any] = {}

    @classmethod
    def create(cls, runs: Path, config: TrainConfig) -> "RunFolder":
        """A new folder under `runs`. Raises ConfigError when the id is unusable or taken."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        run_id = config.run_id or f"{stamp}-{config.stage}-{secrets.token_hex(2)}"
        try:
            path = runs / check_name(run_id)
            path.mkdir(parents=True)
        except NameRefused as error:
            raise ConfigError(f"run_id: {error}") from None
        except FileExistsError:
            raise ConfigError(f"run {run_id} exists already in {runs}; choose another run_id") from None
        run = cls(path)
        run.record(
            format_version=RUN_FORMAT,
            id=run_id,
            state="running",
            pid=os.getpid(),
            started=int(time.time()),
            config=asdict(config),
        )
        return run

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def record(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self._record |= facts
        write_json(self.path / "run.json", self._record)

    def finish(self, state: State, **facts: Any) -> None:
        self.record(state=state, ended=int(time.time()), **facts)

    def write_ledger(self, rejects: Sequence[Reject]) -> None:
        lines = (json.dumps(asdict(reject), ensure_ascii=False) for reject in rejects)
        write_text(self.path / "rejects.jsonl", "".join(line + "\n" for line in lines))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")


def read_run(path: Path) -> dict[str, Any]:
    """A run's record. Raises ConfigError when `path` is no run folder."""
    if not (path / "run.json").is_file():
        raise ConfigError(f"{path}: no run.json, so this is not a run folder")
    return read_json_object(path / "run.json")
