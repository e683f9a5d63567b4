"""What a run shows and keeps while it goes, and what is left of it however it ends."""

import json
import math
import os
import re
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from server.errors import ConfigError
from server.store.home import Home
from trainer.__main__ import main
from trainer.config import TrainConfig
from trainer.errors import Diverged, DriftError, Stopped
from trainer.runs.board import check_board
from trainer.runs.checkpoints import checkpoint_folders, read_checkpoint
from trainer.runs.progress import ProgressBar, TokenMeter
from trainer.runs.run_folder import RunFolder, read_lines, read_run
from trainer.runs.samples import undisturbed
from trainer.runs.stop import Interrupted, StopSignals
from trainer.train import train

STEPS = 10  # of a run of `config`


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [{"instruction": f"question {n}", "output": "answer " * (1 + n % 5)} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(model: Path, data: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "model_name_or_path": str(model),
        "train_file": (str(data),),
        "val_size": 4,
        "run_id": "r",
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "lora_rank": 2,
        "lora_dropout": 0.1,
        "max_length": 128,
        "logging_steps": 1,
        "eval_steps": 5,
        "save_steps": 3,
        "plot_loss": False,
    }
    return TrainConfig(**defaults | options)


def adapter(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def metrics(run: RunFolder, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in read_lines(run.path / "metrics.jsonl") if key in line}


def events(run: Path) -> list[str]:
    return [line["event"] for line in read_lines(run / "events.jsonl")]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing has disturbed."""
    return train(config(tiny_model, data, plot_loss=True), Home(tmp_path_factory.mktemp("home")).create())


def test_the_numbers_of_a_run_are_kept(whole: RunFolder) -> None:
    lines = read_lines(whole.path / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "epoch"} <= training[0].keys()
    tokens = [line["tokens"] for line in training]
    assert tokens == sorted(tokens) and tokens[-1] == 2 * tokens[STEPS // 2 - 1] > 0, "both epochs have the same"
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [5, 10]
    assert evaluations[0]["perplexity"] == pytest.approx(math.exp(evaluations[0]["eval_loss"]))
    assert events(whole.path)[0] == "started" and events(whole.path)[-1] == "done"
    assert events(whole.path).count("checkpoint saved") == 4 and events(whole.path).count("evaluated") == 2
    assert {path.name for path in whole.path.iterdir()} >= {"curves.png", "curves.csv", "run.json", "rejects.jsonl"}


def test_checkpoints_are_sealed_and_the_limit_is_kept(whole: RunFolder) -> None:
    found = [read_checkpoint(folder) for folder in checkpoint_folders(whole.path)]
    assert [checkpoint.step for checkpoint in found] == [6, 9, 10]
    assert all(checkpoint.identity["learning_rate"] == 0.01 for checkpoint in found)
    assert not list(whole.path.rglob("training_args.bin"))


def test_sample_answers_do_not_disturb_training(whole: RunFolder, tiny_model: Path, data: Path, home: Home) -> None:
    run = train(config(tiny_model, data, sample_prompts=("question 1", "你是谁？")), home)
    assert adapter(run) == adapter(whole)
    samples = read_lines(run.path / "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in samples[:2]] == [(0, "question 1"), (0, "你是谁？")]
    assert [line["step"] for line in samples[::2]] == [0, 5, 10] and all(line["answer"] for line in samples)


def test_without_evaluation_samples_come_with_checkpoints(tiny_model: Path, data: Path, home: Home) -> None:
    run = train(config(tiny_model, data, val_size=0, max_steps=4, sample_prompts=("question 1",)), home)
    assert [line["step"] for line in read_lines(run.path / "samples.jsonl")] == [0, 3, 4]


def test_modes_and_random_state_are_as_before(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_a_sample_that_fails_is_told_and_training_goes_on(
    tiny_model: Path, data: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot generate")

    monkeypatch.setattr("transformers.Qwen2ForCausalLM.generate", broken)
    run = train(config(tiny_model, data, max_steps=2, sample_prompts=("question 1",)), home)
    assert events(run.path).count("samples failed") == 1 and read_run(run.path)["state"] == "done"


# ---- resumed


def test_a_run_killed_after_its_last_step_makes_no_step_more(
    whole: RunFolder, tiny_model: Path, data: Path, home: Home
) -> None:
    # 2 epochs would be 10 steps: with 8 the last checkpoint lies in the middle of an epoch.
    run = train(config(tiny_model, data, max_steps=8), home)
    before = adapter(run)
    for file in run.adapter.iterdir():
        file.unlink()
    run.record(state="running", pid=None)  # as SIGKILL leaves it
    again = train(config(tiny_model, data, max_steps=8), home)
    assert adapter(again) == before
    assert max(metrics(again, "loss")) == 8 and "resumed" in events(again.path)


def test_a_changed_learning_rate_is_refused_or_else_obeyed(tiny_model: Path, data: Path, home: Home) -> None:
    run = stopped_at(3, config(tiny_model, data), home)
    changed = {"learning_rate": 0.002, "weight_decay": 0.1}
    with pytest.raises(DriftError, match=r"learning_rate was 0\.01, is 0\.002; weight_decay was 0\.0, is 0\.1"):
        train(config(tiny_model, data, **changed), home)
    assert read_run(run)["state"] == "stopped", "a refused command leaves the run as it was"
    with data.open() as file:
        rows = file.readlines()
    other = data.with_name("other.jsonl")
    other.write_text("".join(rows[:-1]), encoding="utf-8")
    with pytest.raises(DriftError, match="the training data changed"):
        train(config(tiny_model, other), home)

    resumed = train(config(tiny_model, data, resume_override=True, **changed), home)
    rates = metrics(resumed, "learning_rate")
    fresh = train(config(tiny_model, data, run_id="fresh", **changed), home)
    wanted, first = metrics(fresh, "learning_rate"), _resumed_step(run) + 1
    assert rates[3] == pytest.approx(5 * wanted[3]), "what was trained stays as it was"
    assert [rates[step] for step in range(first, STEPS + 1)] == pytest.approx(
        [wanted[step] for step in range(first, STEPS + 1)]
    )
    settings = torch.load(run / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in settings} <= {0.0, 0.1} and settings[0]["weight_decay"] == 0.1


def _resumed_step(run: Path) -> int:
    return next(line["step"] for line in read_lines(run / "events.jsonl") if line["event"] == "resumed")


def stopped_at(step: int, options: TrainConfig, home: Home) -> Path:
    """A run stopped by SIGTERM once checkpoint `step` is there."""
    run = home.runs / str(options.run_id)
    sender = threading.Thread(target=_signal_at, args=(run / f"checkpoint-{step}" / "manifest.json", signal.SIGTERM))
    sender.start()
    with pytest.raises(Stopped):
        train(options, home)
    sender.join()
    return run


def _signal_at(file: Path, number: int) -> None:
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.0005)
    os.kill(os.getpid(), number)


# ---- stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first_and_the_same_command_goes_on(
    number: int,
    code: int,
    whole: RunFolder,
    tiny_model: Path,
    data: Path,
    home: Home,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options, run = config(tiny_model, data, plot_loss=True), home.runs / "r"
    sender = threading.Thread(target=_signal_at, args=(run / "checkpoint-3" / "manifest.json", number))
    sender.start()
    assert main(command(options, home)) == code
    sender.join()
    said = capfd.readouterr().err
    assert re.search(r"error: run r stopped by SIG(TERM|INT) at step (\d+) of 10; checkpoint-\2 is saved, and", said)
    record = read_run(run)
    assert (record["state"], record["exit_code"]) == ("stopped", code)
    assert (run / "curves.png").stat().st_size > 0 and not (run / "adapter").exists()
    assert read_checkpoint(checkpoint_folders(run)[-1]).step >= 4
    assert main(command(options, home)) == 0
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter(whole)
    assert events(run).count("resumed") == 1


def command(options: TrainConfig, home: Home) -> list[str]:
    values = {key: value for key, value in asdict(options).items() if value != getattr(TrainConfig, key, {})}
    words = [f"{key}={','.join(value) if isinstance(value, tuple) else value}" for key, value in values.items()]
    return ["train", "--home", str(home.path), *words]


def test_outside_of_training_a_signal_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped at once by SIGTERM"), StopSignals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_inside_of_training_the_second_signal_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted), StopSignals() as stop:
        stop.is_training = True
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        assert "once more stops at once" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)


# ---- diverged


def test_divergence_keeps_the_last_good_checkpoint_and_the_curves(
    tiny_model: Path, data: Path, home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    options = config(tiny_model, data, learning_rate=1e30, warmup_steps=0, save_steps=1, eval_steps=100, plot_loss=True)
    with pytest.raises(Diverged, match=r"in step \d+.*chat\.jsonl:\d+") as error:
        train(options, home)
    run = home.runs / "r"
    record = read_run(run)
    assert (record["state"], record["exit_code"], error.value.exit_code) == ("failed", 5, 5)
    assert str(error.value) in record["error"]
    last = checkpoint_folders(run)[-1]
    assert f"in step {read_checkpoint(last).step + 1}" in str(error.value)
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == read_checkpoint(last).step
    assert (run / "curves.png").stat().st_size > 0 and "loss" in (run / "curves.csv").read_text()
    assert "loss=0" not in capfd.readouterr().err and not (run / "adapter").exists()


# ---- shown


class _State:
    max_steps = 4
    global_step = 0


def test_the_bar_shows_loss_speed_and_time_left_and_nan_as_nan(capfd: pytest.CaptureFixture[str]) -> None:
    meter = TokenMeter()
    meter.begin(0)
    meter.end(500)
    assert meter.read() > 500 and meter.read() == 0.0
    meter.rate = 1234.4
    bar, state = ProgressBar("sft", meter), _State()
    bar.on_train_begin(None, state, None)  # type: ignore[arg-type]
    bar.on_log(None, state, None, {"loss": math.nan, "grad_norm": 1.0})  # type: ignore[arg-type]
    state.global_step = 2
    bar.on_step_end(None, state, None)  # type: ignore[arg-type]
    bar.close()
    shown = capfd.readouterr().err
    assert "sft:  50%" in shown and "2/4" in shown and "loss=nan, 1234 tokens/s" in shown and "<" in shown


def test_evaluation_does_not_slow_the_shown_speed() -> None:
    meter = TokenMeter()
    meter.begin(0)
    meter.end(100)
    first = meter._seconds
    time.sleep(0.02)  # an evaluation between two steps
    meter.begin(100)
    meter.end(200)
    assert meter._seconds < first + 0.02


def test_tensorboard_on_request(tiny_model: Path, data: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(config(tiny_model, data, max_steps=2, report_to=("tensorboard",)), home)
    assert [path.stat().st_size > 100 for path in (run.path / "tensorboard").iterdir()] == [True]
    monkeypatch.setattr("trainer.runs.board.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        check_board(("tensorboard",))
    check_board(())


def test_a_prompt_encoder_goes_on_too_and_its_best_is_the_result(tiny_model: Path, data: Path, home: Home) -> None:
    """peft's own checkpoint has only the prompt that the encoder computes."""
    options = {"finetuning_type": "p_tuning", "pre_seq_len": 4, "load_best_model_at_end": True, "eval_steps": 3}
    undisturbed_run = train(config(tiny_model, data, run_id="whole", **options), home)
    run = stopped_at(3, config(tiny_model, data, **options), home)
    resumed = train(config(tiny_model, data, **options), home)
    assert adapter(resumed) == adapter(undisturbed_run)
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    best = run / f"checkpoint-{state['best_global_step']}" / "adapter_model.safetensors"
    assert torch.equal(load_file(best)["prompt_embeddings"], load(adapter(resumed))["prompt_embeddings"])
