"""`eval_tasks`: a run in training asked as it would be served, and found fault with before it begins."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from server.store.home import Home
from tests.services import ROOT
from trainer.config import TrainConfig
from trainer.errors import ConfigFaults, DataError, Stopped, TrainerError
from trainer.evaluate.during import EVALS, RunEvaluation, figures, plan_tasks
from trainer.evaluate.eval_folder import read_result
from trainer.evaluate.open_candidate import CandidateOptions
from trainer.evaluate.session import evaluate_name
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.make import make_tasks
from trainer.options.resolve import resolve
from trainer.runs.curves import read_curves
from trainer.runs.run_folder import RunFolder, read_lines, read_run
from trainer.train import train

QWEN2 = {"model_type": "qwen2"}
KEY = "likelihood/held_out/log_likelihood"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [{"instruction": f"question {n}", "output": "answer " * (1 + n % 5)} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    rows = [{"instruction": f"question {n}?", "output": "answer answer"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(model: Path, data: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "model_name_or_path": str(model),
        "train_file": (str(data),),
        "run_id": "r",
        "max_steps": 2,
        "eval_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.01,
        "lora_rank": 2,
        "max_length": 128,
        "logging_steps": 1,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
    }
    return TrainConfig(**defaults | options)


def measured(run: RunFolder, key: str = KEY) -> dict[int, float]:
    return {line["step"]: line[key] for line in read_lines(run.path / "metrics.jsonl") if key in line}


def evaluated(home: Home, task: str, limit: int | None = 100) -> dict[str, float]:
    """What `python -m trainer eval r` says."""
    settings = EvalSettings(limit=limit)
    options = CandidateOptions(engine="hf")
    done = evaluate_name("r", make_tasks([task], settings), home, settings, options, shows_progress=False)
    return figures(done.result)


def folders(run: RunFolder) -> list[str]:
    return sorted(path.name for path in (run.path / EVALS).iterdir())


@pytest.mark.e2e
def test_the_last_figures_are_those_of_eval_on_the_finished_run(
    tiny_model: Path, data: Path, held_out: Path, home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    task = f"likelihood={held_out}"
    run = train(config(tiny_model, data, eval_tasks=(task,), eval_task_limit=4), home)
    found = measured(run)
    assert sorted(found) == [0, 2] and found[2] > found[0], "it learned to answer"
    assert read_run(run.path)["eval_tasks"] == {KEY: found[2]}
    assert evaluated(home, task, limit=4) == pytest.approx({KEY: found[2]})
    assert folders(run) == ["step-0", "step-2"], "no weights are left"
    result = read_result(run.path / EVALS / "step-2").tasks[0]
    assert (result.num_items, result.num_scored) == (6, 4)
    assert f"step 2: likelihood/held_out log_likelihood {found[2]:.4f} (" in capfd.readouterr().err
    assert read_curves(run.path)[-1][KEY] == found[2]


@pytest.mark.slow
@pytest.mark.e2e
def test_training_goes_as_without_it(tiny_model: Path, data: Path, held_out: Path, home: Home) -> None:
    options = {"val_size": 4, "max_steps": 3, "lora_dropout": 0.1, "eval_steps": 2}
    plain = train(config(tiny_model, data, run_id="plain", **options), home)
    run = train(config(tiny_model, data, eval_tasks=(f"likelihood={held_out}",), **options), home)
    weights = [(each.adapter / "adapter_model.safetensors").read_bytes() for each in (plain, run)]
    assert weights[0] == weights[1]
    assert sorted(measured(run)) == [0, 2, 3], "with the validation, and at the end"


@pytest.mark.slow
@pytest.mark.e2e
def test_whole_weights_are_served_as_a_model(tiny_model: Path, data: Path, held_out: Path, home: Home) -> None:
    task = f"likelihood={held_out}"
    run = train(config(tiny_model, data, finetuning_type="full", eval_tasks=(task,)), home)
    found = measured(run)
    assert found[2] > found[0] and evaluated(home, task) == pytest.approx({KEY: found[2]})


@pytest.mark.slow
@pytest.mark.e2e
def test_the_best_step_s_figures_are_the_result_s(tiny_model: Path, data: Path, held_out: Path, home: Home) -> None:
    """The second step throws away what the first one learned."""
    task = f"likelihood={held_out}"
    options = {"val_size": 4, "eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "learning_rate": 3.0}
    options |= {"load_best_model_at_end": True, "max_steps": 3, "warmup_steps": 0.0}
    run = train(config(tiny_model, data, eval_tasks=(task,), **options), home)
    losses = measured(run, "eval_loss")
    best = min(losses, key=lambda step: losses[step])
    assert read_run(run.path)["eval_tasks"] == {KEY: measured(run)[best]}
    assert evaluated(home, task) == pytest.approx({KEY: measured(run)[best]})
    assert sorted(measured(run)) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_resumed_run_asks_from_there_on(tiny_model: Path, data: Path, held_out: Path, home: Home) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options["eval_tasks"] = (f"likelihood={held_out}",)
    run = train(config(tiny_model, data, **options), home)
    before = measured(run)
    for file in run.adapter.iterdir():
        file.unlink()
    (run.path / "checkpoint-4" / "manifest.json").unlink()  # as a kill in the middle of the last save leaves it
    run.record(state="running", pid=None)
    began = (run.path / EVALS / "step-2" / "result.json").stat().st_mtime_ns
    again = train(config(tiny_model, data, **options), home)
    assert measured(again) == pytest.approx(before) and sorted(before) == [0, 2, 4]
    lines = [line["step"] for line in read_lines(again.path / "metrics.jsonl") if KEY in line]
    assert lines == [0, 2, 4], "nothing is there twice"
    assert (run.path / EVALS / "step-2" / "result.json").stat().st_mtime_ns == began


@pytest.mark.slow
@pytest.mark.e2e
def test_what_fails_on_the_way_does_not_end_the_run(
    tiny_model: Path, data: Path, held_out: Path, home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    """The engine starts before the first step, and never after it."""
    original = RunEvaluation.prove

    def then_broken(self: RunEvaluation, step: int, write: Any) -> None:
        original(self, step, write)
        self._plan.engine["hf_dtype"] = "nonsense"  # type: ignore[index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunEvaluation, "prove", then_broken)
        run = train(config(tiny_model, data, eval_tasks=(f"likelihood={held_out}",), eval_steps=1), home)
    said = capfd.readouterr().err
    assert read_run(run.path)["state"] == "done" and sorted(measured(run)) == [0]
    assert "warning: step 1: eval_tasks: the engine did not start" in said
    assert "not evaluated at step 1, 2" in said and "python -m trainer eval r --task likelihood=" in said


@pytest.mark.e2e
def test_an_engine_that_does_not_start_is_found_before_the_first_step(
    tiny_model: Path, data: Path, held_out: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLOOP_HF_DTYPE", "nonsense")
    with pytest.raises(TrainerError, match=r"eval_tasks: the engine did not start.*evaluate after training: python"):
        train(config(tiny_model, data, eval_tasks=(f"likelihood={held_out}",)), home)
    assert read_run(home.runs / "r")["state"] == "failed"
    assert not read_lines(home.runs / "r" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.e2e
def test_a_signal_ends_an_evaluation_under_way(tiny_model: Path, data: Path, home: Home, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"instruction": f"{n}?", "output": "yes"}) + "\n" for n in range(4000)))
    options: dict[str, Any] = {"eval_tasks": (f"likelihood={many}",), "eval_task_limit": None}
    begun = home.runs / "r" / EVALS / "step-0" / "items.jsonl"
    sender = threading.Thread(target=_terminate_at, args=(begun,))
    sender.start()
    with pytest.raises(Stopped, match="checkpoint-1 is saved"):
        train(config(tiny_model, data, **options), home)
    sender.join()
    assert begun.exists() and not (begun.parent / "result.json").exists(), "it was under way"
    assert "evaluation of tasks left out" in [line["event"] for line in read_lines(begun.parents[2] / "events.jsonl")]
    run = train(config(tiny_model, data, **options), home)
    assert sorted(measured(run, "likelihood/many/log_likelihood")) == [2]


def _terminate_at(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_of_two_processes_the_first_evaluates(tiny_model: Path, data: Path, held_out: Path, home: Home) -> None:
    task = f"likelihood={held_out}"
    options = {"model": tiny_model, "train_file": data, "run_id": "r", "max_steps": 2, "eval_steps": 2}
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 0.01, "num_processes": 2, "plot_loss": "false"}
    words = [f"{key}={value}" for key, value in options.items()] + [f"eval_tasks={task}", "--home", str(home.path)]
    command = [sys.executable, "-m", "trainer", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    run = RunFolder(home.runs / "r")
    assert sorted(measured(run)) == [0, 2] and done.stderr.count("step 2: likelihood/held_out") == 1
    assert evaluated(home, task) == pytest.approx({KEY: measured(run)[2]})


JOIN = """
import torch
from trainer.config import TrainConfig
from trainer.train import join_processes
config = TrainConfig(model_name_or_path="base", train_file=("a.jsonl",), hf_arguments={"ddp_timeout": 7200})
join_processes(config)
group = torch.distributed.distributed_c10d._get_default_group()
print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


def test_processes_wait_for_each_other_as_long_as_ddp_timeout_says() -> None:
    """A long evaluation in the first one does not end the run; the group is made before transformers asks for it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | place | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", JOIN], capture_output=True, text=True, cwd=ROOT, timeout=110, env=environment
    )
    assert done.stdout.split() == ["7200.0"], done.stderr


# ---- found before anything is loaded


@pytest.mark.parametrize(
    ("task", "error", "says"),
    [
        ("chioce=x", ConfigError, "eval_tasks: chioce=x: chioce is no kind of task"),
        ("/nowhere/mmlu", ConfigError, "eval_tasks: .*/nowhere/mmlu"),
        ("identity=", ConfigError, "eval_tasks: identity=: .*what comes after = is missing"),
        ("likelihood={empty}", DataError, "eval_tasks: likelihood=.*nothing in it can be scored"),
    ],
)
def test_a_bad_task_is_named_before_the_run_begins(
    task: str, error: type[Exception], says: str, tiny_model: Path, data: Path, home: Home, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(error, match=says):
        train(config(tiny_model, data, eval_tasks=(task.format(empty=empty),)), home)
    assert not (home.runs / "r").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, r"use_dora=True is served by no engine.*trainer merge RUN.*eval merged/ --task safety"),
        ({"finetuning_type": "peft", "peft_config": {"peft_type": "OFT", "r": 8}}, "OFT adapters are served by no"),
    ],
)
def test_a_method_that_no_engine_serves_is_refused_with_the_way_out(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_tasks(config(Path("base"), Path("a.jsonl"), eval_tasks=("safety",), **options), QWEN2)


@pytest.mark.parametrize("method", ["lora", "qlora", "ptuning_v2", "prompt", "ia3", "full", "freeze"])
def test_what_an_engine_serves_is_planned(method: str) -> None:
    options = config(Path("base"), Path("a.jsonl"), finetuning_type=method, eval_tasks=("safety", "identity=小智"))
    plan = plan_tasks(options, QWEN2)
    assert plan is not None and [task.name for task in plan.tasks] == ["safety", "identity"]
    assert plan.command == "python -m trainer eval RUN --task safety --task 'identity=小智' --limit 100"
    assert plan_tasks(config(Path("base"), Path("a.jsonl")), QWEN2) is None


def test_options_are_read_from_words_and_checked(tiny_model: Path, data: Path) -> None:
    words = [f"model={tiny_model}", f"train_file={data}"]
    read = resolve(None, [*words, "eval_tasks=safety,identity=小智", "eval_task_limit=none", "eval_strategy=epoch"])
    assert (read.config.eval_tasks, read.config.eval_task_limit) == (("safety", "identity=小智"), None)
    for wrong, says in {
        "eval_task_limit=5": "eval_task_limit without eval_tasks",
        "eval_strategy=epoch": "without validation data: set val_file or val_size, or eval_tasks",
    }.items():
        with pytest.raises(ConfigFaults, match=says):
            resolve(None, [*words, wrong])
    with pytest.raises(ConfigFaults, match="eval_tasks with stage=rm"):
        resolve(None, [*words, "eval_tasks=safety", "stage=rm"])
