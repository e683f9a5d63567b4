"""Which run a command means, which checkpoint it goes on from, and whether both still fit together.

A run is found by `run_id` or `output_dir`; without either it is the newest unfinished run of the same command: same
files, same settings (options that change no weight do not count). `resume=never` always begins a new one. A checkpoint
belongs to its *identity*: the settings that shape the weights and the hashes of data and base. Imports no torch.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.store.hashes import text_hash
from server.store.names import NameRefused, check_name
from server.text.identity import TextIdentity
from trainer.config import TrainConfig
from trainer.errors import DriftError
from trainer.runs.checkpoints import (
    Checkpoint,
    Torn,
    checkpoint_folders,
    discard,
    last_complete,
    read_checkpoint,
)
from trainer.runs.run_folder import LOCK, RECORD, RunFolder, list_runs, read_run

# Options that change no weight: they may differ between a run's beginning and its end.
FREE = frozenset(
    {
        "run_id",
        "output_dir",
        "resume",
        "resume_override",
        "logging_steps",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "sample_prompts",
        "eval_tasks",
        "eval_task_limit",
        "plot_loss",
        "report_to",
        "disable_tqdm",
        "cpu_ok",
        "memory_check",
        "max_reject_ratio",
        "per_device_eval_batch_size",
        "gradient_checkpointing",
    }
)
# Options that name what the hashes hold: a moved folder is no other folder.
PATHS = frozenset({"model_name_or_path", "train_file", "val_file", "replay_file", "max_samples"})
HASHES = {
    "dataset_hash": "the training data",
    "base_weights_hash": "the base model's weights",
    "tokenizer_hash": "the base model's tokenizer",
    "chat_template_hash": "the base model's chat template",
}

NO_TEXT = TextIdentity("", "")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where training begins. `checkpoint` is None for the first step; `changed` is what resume_override let pass."""

    checkpoint: Path | None = None
    step: int = 0
    changed: tuple[str, ...] = ()


def run_identity(
    config: TrainConfig,
    *,
    dataset_hash: str,
    base_weights_hash: str,
    text: TextIdentity = NO_TEXT,
    num_processes: int = 1,
) -> dict[str, Any]:
    """What shapes the weights, as plain JSON values."""
    settings = {key: value for key, value in _plain(config).items() if key not in FREE | PATHS}
    return {
        **settings,
        "dataset_hash": dataset_hash,
        "base_weights_hash": base_weights_hash,
        **asdict(text),
        "num_processes": num_processes,
    }


def command_hash(config: TrainConfig) -> str:
    """The same for two commands that mean the same run."""
    kept = {key: value for key, value in _plain(config).items() if key not in FREE}
    return text_hash(json.dumps(kept, sort_keys=True))


def claim_run(config: TrainConfig, runs: Path) -> RunFolder:
    """The run that this command means, locked; nothing in it has changed yet.

    Raises ConfigError when it is done already, is being trained, or its name or folder cannot be used.
    """
    named = _named(config, runs)
    checkpoint = _resume_path(config)
    path = named
    if named is None and checkpoint is not None:
        path = _unfinished_parent(checkpoint)
    elif named is None and config.resume == "auto":
        path = _newest_unfinished(config, runs)
    if path is None:
        path = runs / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{config.stage}-{secrets.token_hex(2)}"
    _check_free(path, config)
    run = RunFolder(path)
    run.lock()
    try:
        _check_free(path, config)  # once more: its last owner may have finished it in between
    except ConfigError:
        run.unlock()
        raise
    return run


def choose_start(run: RunFolder, config: TrainConfig, identity: Mapping[str, Any], say: Say) -> Start:
    """The checkpoint to go on from. Raises DriftError, and then nothing was changed.

    Afterwards the run holds nothing from beyond that step: torn and later checkpoints are removed, each by name.
    """
    chosen = _resume_path(config)
    found, torn = last_complete(run.path)
    if chosen is not None:
        found = _read_chosen(chosen)
    changed = tuple(drift(found.identity, identity)) if found else ()
    if found and changed and not config.resume_override:
        raise DriftError(
            f"run {run.id} cannot go on from {found.name}: {'; '.join(changed)}. Put that back, or start anew with "
            "another run_id and resume=never, or go on all the same with resume_override=true"
        )
    reasons = dict(torn)
    for folder in checkpoint_folders(run.path):
        if folder in reasons or (found and _step_of(folder) > found.step):
            reason = reasons.get(folder, "it is later than the one to go on from")
            say(f"{folder.name} is passed over and removed: {reason}")
            discard(folder)
    if not found:
        return Start()
    for line in changed:
        say(f"resume_override: {line}")
    return Start(found.path, found.step, changed)


def drift(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per difference. A setting that the older side does not know counts as its default."""
    defaults = _json(
        {f.name: f.default for f in fields(TrainConfig) if isinstance(f.default, str | int | float | tuple)}
    )
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = (side.get(key, defaults.get(key)) for side in (before, now))
        if old != new and key in HASHES:
            lines.append(f"{HASHES[key]} changed ({key} was {str(old)[:12]}, is {str(new)[:12]})")
        elif old != new:
            lines.append(f"{key} was {old}, is {new}")
    return lines


def _plain(config: TrainConfig) -> dict[str, Any]:
    return _json(asdict(config))


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a JSON file: tuples are lists."""
    result: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return result


def _named(config: TrainConfig, runs: Path) -> Path | None:
    if config.output_dir:
        return Path(config.output_dir).expanduser().absolute()
    try:
        return runs / check_name(config.run_id) if config.run_id else None
    except NameRefused as error:
        raise ConfigError(f"run_id: {error}") from None


def _resume_path(config: TrainConfig) -> Path | None:
    """The checkpoint or run folder that `resume` names."""
    if config.resume in ("auto", "never"):
        return None
    path = Path(config.resume).expanduser()
    if path.is_dir():
        return path.absolute()
    raise ConfigError(
        f"resume={config.resume}: no such folder; accepted are auto, never, a checkpoint or a run's folder"
    )


def _read_chosen(path: Path) -> Checkpoint:
    if (path / RECORD).is_file():
        found, torn = last_complete(path)
        if found:
            return found
        detail = "; ".join(f"{folder.name}: {reason}" for folder, reason in torn)
        raise ConfigError(f"resume={path}: the run has no whole checkpoint{f' ({detail})' if detail else ''}")
    try:
        return read_checkpoint(path)
    except Torn as error:
        raise ConfigError(f"resume={path}: this is no whole checkpoint: {error}") from None


def _unfinished_parent(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in, unless that run is done: then a new run begins with it."""
    run = checkpoint if (checkpoint / RECORD).is_file() else checkpoint.parent
    if not (run / RECORD).is_file() or read_run(run).get("state") == "done":
        return None
    return run


def _newest_unfinished(config: TrainConfig, runs: Path) -> Path | None:
    wanted = command_hash(config)
    same = [r for r in list_runs(runs) if r.get("command_hash") == wanted and r["state"] != "done"]
    return Path(same[-1]["path"]) if same else None


def _check_free(path: Path, config: TrainConfig) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder, so no run can be written there; choose another output_dir")
    if not (path / RECORD).is_file():
        if any(file.name != LOCK and not file.name.startswith(f".{RECORD}") for file in path.iterdir()):
            raise ConfigError(f"{path} holds files but no run; choose another run_id or output_dir, or empty it")
        return
    state = read_run(path).get("state")
    if state == "done" or config.resume == "never":
        why = "is done" if state == "done" else f"exists already ({state}) and resume=never forbids to go on with it"
        raise ConfigError(f"run {path.name} in {path.parent} {why}; choose another run_id or remove that folder")


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
