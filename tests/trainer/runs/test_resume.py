"""Which run a command means, from where it goes on, and when it must not."""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from trainer.config import TrainConfig
from trainer.errors import DriftError
from trainer.runs.checkpoints import MANIFEST, seal
from trainer.runs.resume import FREE, PATHS, choose_start, claim_run, command_hash, drift, run_identity
from trainer.runs.run_folder import RunFolder


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"model_name_or_path": "base", "train_file": ("a.jsonl",)} | options)


def identity(options: TrainConfig, data: str = "d1", base: str = "b1") -> dict[str, Any]:
    return run_identity(options, dataset_hash=data, base_weights_hash=base)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


class Claims:
    """Claimed runs, let go of at the end of a test."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.held: list[RunFolder] = []

    def __call__(self, options: TrainConfig, state: str = "stopped") -> RunFolder:
        run = claim_run(options, self.runs)
        self.held.append(run)
        run.start(command_hash=command_hash(options))
        run.record(state=state, started=len(self.held))
        return run


@pytest.fixture
def claim(runs: Path) -> Iterator[Claims]:
    claims = Claims(runs)
    yield claims
    for run in claims.held:
        run.unlock()


def checkpoint(run: RunFolder, step: int, options: TrainConfig, **hashes: str) -> Path:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    seal(folder, step, identity(options, **hashes))
    return folder


# ---- which run


def test_the_same_command_means_the_same_run_until_it_is_done(claim: Claims) -> None:
    first = claim(config())
    assert claim(config(logging_steps=7, plot_loss=False)).path == first.path, "these change no weight"
    assert claim(config(learning_rate=3e-3)).path != first.path
    assert claim(config(train_file=("b.jsonl",))).path != first.path
    assert claim(config(resume="never")).path != first.path
    first.record(state="done")
    newest = claim(config(), "failed").path
    assert newest != first.path
    assert claim(config()).path == newest


def test_a_run_that_is_finished_while_one_looks_is_not_trained_again(
    claim: Claims, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lock = claim(config(run_id="mine")), fcntl.lockf

    def finished_first(*arguments: Any) -> None:
        run.record(state="done")
        lock(*arguments)

    monkeypatch.setattr("trainer.runs.run_folder.fcntl.lockf", finished_first)
    with pytest.raises(ConfigError, match=r"run mine in .* is done"):
        claim_run(config(run_id="mine"), runs)


def test_of_several_unfinished_runs_the_newest_goes_on(claim: Claims) -> None:
    claim(config(resume="never"))
    second = claim(config(resume="never"), "killed")
    assert claim(config()).path == second.path


def test_a_named_run_goes_on_whatever_its_settings_were(claim: Claims, runs: Path) -> None:
    first = claim(config(run_id="mine"))
    assert first.path == runs / "mine"
    assert claim(config(run_id="mine", learning_rate=0.5)).path == first.path


def test_output_dir_is_the_run_s_folder(claim: Claims, tmp_path: Path) -> None:
    assert claim(config(output_dir=str(tmp_path / "out" / "x"))).path == tmp_path / "out" / "x"


def test_a_finished_or_foreign_folder_is_never_written_into(claim: Claims, runs: Path, tmp_path: Path) -> None:
    claim(config(run_id="mine"), "done")
    with pytest.raises(ConfigError, match=r"run mine in .* is done; choose another run_id"):
        claim(config(run_id="mine"))
    claim(config(run_id="half"), "stopped")
    with pytest.raises(ConfigError, match=r"exists already .stopped. and resume=never"):
        claim(config(run_id="half", resume="never"))
    (runs / "notes").mkdir()
    (runs / "notes" / "x.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files but no run"):
        claim(config(run_id="notes"))
    with pytest.raises(ConfigError, match="is no folder"):
        claim(config(output_dir=str(runs / "notes" / "x.txt")))
    with pytest.raises(ConfigError, match=r"run_id: .*not a usable name"):
        claim(config(run_id="../x"))


def test_a_folder_that_a_kill_left_before_run_json_is_taken(claim: Claims, runs: Path) -> None:
    (runs / "early").mkdir(parents=True)
    (runs / "early" / ".lock").touch()
    (runs / "early" / ".run.json.abc").write_text("{")
    assert claim(config(run_id="early")).path == runs / "early"


def test_a_checkpoint_of_an_unfinished_run_goes_on_there_of_a_finished_one_in_a_new_run(claim: Claims) -> None:
    run = claim(config())
    folder = checkpoint(run, 4, config())
    again = config(resume=str(folder), learning_rate=0.5)
    assert claim(again).path == run.path
    run.record(state="done")
    new = claim(again)
    assert new.path != run.path
    options = config(resume=str(folder))
    assert choose_start(new, options, identity(options), print).checkpoint == folder
    with pytest.raises(ConfigError, match="resume=nowhere: no such folder; accepted are auto, never"):
        claim(config(resume="nowhere"))


# ---- from where


def test_torn_and_later_checkpoints_are_named_and_removed(claim: Claims) -> None:
    run, said = claim(config()), list[str]()
    for step in (2, 4, 6):
        checkpoint(run, step, config())
    (run.path / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"weightz")
    (run.path / "checkpoint-8").mkdir()
    start = choose_start(run, config(), identity(config()), said.append)
    assert (start.checkpoint, start.step, start.changed) == (run.path / "checkpoint-4", 4, ())
    assert [line.split(":")[0] for line in said] == [
        "checkpoint-6 is passed over and removed",
        "checkpoint-8 is passed over and removed",
    ]
    assert sorted(path.name for path in run.path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_named_older_checkpoint_ends_the_later_ones(claim: Claims) -> None:
    run, said = claim(config()), list[str]()
    for step in (2, 4):
        checkpoint(run, step, config())
    options = config(resume=str(run.path / "checkpoint-2"))
    assert choose_start(run, options, identity(options), said.append).step == 2
    assert said == ["checkpoint-4 is passed over and removed: it is later than the one to go on from"]


def test_a_named_checkpoint_must_be_whole(claim: Claims) -> None:
    run = claim(config())
    folder = checkpoint(run, 2, config())
    (folder / MANIFEST).unlink()
    for given, reason in ((folder, "no whole checkpoint: it has no manifest"), (run.path, "has no whole checkpoint")):
        options = config(resume=str(given))
        with pytest.raises(ConfigError, match=reason):
            choose_start(run, options, identity(options), print)
    assert folder.exists()


def test_without_a_whole_checkpoint_it_begins_anew(claim: Claims) -> None:
    run = claim(config())
    (run.path / "checkpoint-2").mkdir()
    start = choose_start(run, config(), identity(config()), print)
    assert (start.checkpoint, start.step) == (None, 0)


# ---- drift


@pytest.mark.parametrize(
    ("options", "data", "base", "line"),
    [
        ({"learning_rate": 2e-4}, "d1", "b1", "learning_rate was 0.0001, is 0.0002"),
        ({"lora_target": ("q_proj",)}, "d1", "b1", r"lora_target was \['all-linear'\], is \['q_proj'\]"),
        ({}, "d2", "b1", "the training data changed .dataset_hash was d1, is d2"),
        ({}, "d1", "b2", "the base model's weights changed .base_weights_hash was b1, is b2"),
        ({"lora_rank": 4, "seed": 1}, "d2", "b1", "data changed .*; lora_rank was 16, is 4; seed was 42, is 1"),
    ],
)
def test_what_has_drifted_is_listed_and_nothing_is_touched(
    claim: Claims, options: dict[str, Any], data: str, base: str, line: str
) -> None:
    run = claim(config(run_id="r"))
    kept = checkpoint(run, 2, config())
    (run.path / "checkpoint-3").mkdir()
    changed = config(run_id="r", **options)
    with pytest.raises(DriftError, match=f"run r cannot go on from checkpoint-2: .*{line}.*resume_override=true"):
        choose_start(run, changed, identity(changed, data, base), print)
    assert kept.exists() and (run.path / "checkpoint-3").exists()

    said: list[str] = []
    forced = config(run_id="r", resume_override=True, **options)
    start = choose_start(run, forced, identity(forced, data, base), said.append)
    assert start.step == 2 and start.changed and all(f"resume_override: {change}" in said for change in start.changed)


def test_what_changes_no_weight_is_no_drift() -> None:
    names = {option.name for option in TrainConfig.__dataclass_fields__.values()}
    assert names >= FREE | PATHS, "a renamed option would be compared by mistake"
    here = identity(config(train_file=("/elsewhere/a.jsonl",), model_name_or_path="/other/base", save_steps=5))
    assert drift(identity(config()), here) == []


def test_a_checkpoint_of_an_older_version_lacks_new_settings_at_their_defaults() -> None:
    older = json.loads(json.dumps(identity(config())))
    del older["lora_rank"]
    assert drift(older, identity(config())) == []
    assert drift(older, identity(config(lora_rank=2))) == ["lora_rank was 16, is 2"]


def test_more_processes_are_drift() -> None:
    two = run_identity(config(), dataset_hash="d1", base_weights_hash="b1", num_processes=2)
    assert drift(identity(config()), two) == ["num_processes was 1, is 2"]
