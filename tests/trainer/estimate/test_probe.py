"""The short run: options that `train` takes, whatever was given, and what is measured of it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from server.store.home import Home
from trainer.__main__ import main
from trainer.commands.train import resolve_words
from trainer.estimate.probe import Probe, short_run
from trainer.machine import Machine
from trainer.options.resolve import resolve

GPU = Machine(("NVIDIA GPU",))
OURS = {
    *("resume", "logging_steps", "plot_loss", "disable_tqdm", "save_strategy", "max_steps", "output_dir"),
    *("load_best_model_at_end", "early_stopping_patience", "eval_tasks", "eval_task_limit", "sample_prompts"),
}


def write_rows(path: Path, *answer: dict[str, str]) -> Path:
    line = json.dumps({"messages": [{"role": "user", "content": "你是谁？"}, *answer]})
    path.write_text(f"{line}\n" * 40, encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", {"role": "assistant", "content": "我是演示助手。"})


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["num_train_epochs=2"], set()),
        (["--output_dir", "mine", "--max_steps=7", "--save-strategy", "epoch", "resume=auto"], set()),
        (["overwrite_output_dir=true", "--plot_loss", "save_total_limit=2"], set()),
        (["val_size=2", "load_best_model_at_end=true", "early_stopping_patience=2"], set()),
        (["val_size=2", "eval_strategy=steps", "eval_tasks=safety", "sample_prompts=who, and why?"], set()),
        (["eval_strategy=steps", "eval_tasks=safety", "eval_task_limit=5"], {"eval_strategy"}),
        (["stage=ppo", "reward_model=r", "ppo_max_new_tokens=8"], set()),
        (["deepspeed=zero2", "finetuning_type=lora"], set()),
        (["max_source_length=8", "max_target_length=8", "max_length=2048"], set()),
        (["finetuning_type=qlora", 'lr_scheduler_kwargs={"num_cycles": 0.3}'], set()),
    ],
)
def test_train_takes_the_options_of_the_short_run(
    rows: Path, tmp_path: Path, words: list[str], changed: set[str]
) -> None:
    """A configuration file of its own: nothing is given twice, and nothing needs what is not there."""
    mine, file, run = tmp_path / "mine.yaml", tmp_path / "probe.json", tmp_path / "run"
    mine.write_text(f"model_name_or_path: qwen2-demo\ntrain_file: {rows}\n", encoding="utf-8")
    resolved = resolve_words([str(mine), *words], machine=GPU)
    file.write_text(json.dumps(short_run(resolved, 5, run)), encoding="utf-8")
    given, told = asdict(resolved.config), asdict(resolve(file, machine=GPU).config)
    assert (told["max_steps"], told["output_dir"], told["resume"], told["logging_steps"]) == (5, str(run), "never", 1)
    assert not (told["load_best_model_at_end"] or told["eval_tasks"] or told["early_stopping_patience"])
    assert told["stage"] == "ppo" or told["save_strategy"] == "no"
    assert {name for name in given if given[name] != told[name]} <= OURS | changed


def test_a_peak_that_is_not_measured_is_said() -> None:
    made = Probe(steps=4, step_s=1.0, steps_per_epoch=9, steps_in_all=27, peak_bytes=None, on_gpu=False)
    assert list(made.lines(1 << 30))[1] == "peak: not measured with several processes, nor with deepspeed or fsdp"


def measured(capsys: pytest.CaptureFixture[str], home: Home, model: Path, data: Path, *words: str) -> dict[str, float]:
    given = [f"model={model}", f"data={data}", "max_length=64", "gradient_accumulation_steps=2", *words]
    code = main(["estimate", "--home", str(home.path), "--probe", "3", "--json", *given])
    told = capsys.readouterr()
    assert code == 0, told.err
    found: dict[str, float] = json.loads(told.out)["probe"]
    assert found["steps"] == 3 and found["step_s"] > 0
    return found


@pytest.mark.slow
def test_a_run_that_chooses_and_asks_is_probed(
    tiny_model: Path, rows: Path, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("val_size=4", "load_best_model_at_end=true", "eval_strategy=epoch", "save_strategy=epoch")
    more = ("eval_tasks=safety", "max_steps=9", "logging_steps=7", f"output_dir={tmp_path / 'mine'}")
    found = measured(capsys, home, tiny_model, rows, *words, *more)
    assert found["steps_in_all"] == 9 and found["peak_bytes"] > 100 << 20
    assert not (tmp_path / "mine").exists()


@pytest.mark.slow
def test_ppo_is_probed(tiny_model: Path, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    reward = tmp_path / "reward"
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(reward)
    words = ("stage=ppo", f"reward_model={reward}", "ppo_max_new_tokens=6")
    found = measured(capsys, home, tiny_model, write_rows(tmp_path / "asked.jsonl"), *words)
    assert found["steps_per_epoch"] == 20 and found["peak_bytes"] > 100 << 20


@pytest.mark.slow
def test_an_idle_launchers_peak_is_not_told(
    tiny_model: Path, rows: Path, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured(capsys, home, tiny_model, rows, "num_processes=2")["peak_bytes"] is None
