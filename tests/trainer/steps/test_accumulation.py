"""A step's result does not depend on how it is cut: into passes, over ranks, into packs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.config import TrainConfig
from trainer.runs.run_folder import read_lines

# 11 rows of uneven lengths in steps of 8: the second step of each epoch is not full.
NUM_ROWS, WINDOW = 11, 8
LAYOUTS = {
    "8x1": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "packing": False},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "packing": False},
    "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "packing": False},
    "packed 8x1": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "packing": True},
    "packed 1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "packing": True},
}
RANKS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
SCRIPT = """
import json, sys
from pathlib import Path
from server.store.home import Home
from trainer.config import TrainConfig
from trainer.train import train
train(TrainConfig(**json.loads(sys.argv[1])), Home(Path(sys.argv[2])))
"""


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    data, val = tmp_path / "chat.jsonl", tmp_path / "val.jsonl"
    rows = [{"instruction": f"q{n}", "output": "ab " * (1 + 5 * n % 13)} for n in range(NUM_ROWS)]
    data.write_text("\n".join(map(json.dumps, rows)))
    val.write_text("\n".join(map(json.dumps, rows[:5])))
    return {
        "model_name_or_path": str(tiny_model),
        "train_file": [str(data)],
        "val_file": [str(val)],
        "eval_steps": 1,
        "per_device_eval_batch_size": 2,
        "finetuning_type": "full",
        "num_train_epochs": 2.0,
        "learning_rate": 0.01,
        # Adam divides a gradient by its own size, which makes rounding of tiny ones large.
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "max_length": 256,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
        "seed": 3,
    }


def run_single(options: dict[str, Any], home: Path) -> Path:
    from server.store.home import Home
    from trainer.train import train

    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return train(TrainConfig(**values), Home(home)).path


def assert_same(first: Path, second: Path) -> None:
    wanted, found = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    for name, weight in wanted.items():
        assert torch.allclose(found[name], weight, atol=1e-5, rtol=0), name
    for key in ("loss", "eval_loss", "grad_norm"):
        curves = [[line[key] for line in read_lines(run / "metrics.jsonl") if key in line] for run in (first, second)]
        assert len(curves[0]) == 4 and curves[0] == pytest.approx(curves[1], abs=1e-4), key


def test_accumulation_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    first = run_single(options | LAYOUTS["8x1"], tmp_path / "first")
    untrained = load_file(Path(options["model_name_or_path"]) / "model.safetensors")
    trained = load_file(first / "model" / "model.safetensors")
    assert max(float((trained[name] - untrained[name]).abs().max()) for name in trained) > 1e-3
    for name, layout in LAYOUTS.items():
        assert_same(first, run_single(options | layout, tmp_path / name))


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ranks_are_exact(options: dict[str, Any], tmp_path: Path, packing: bool) -> None:
    first = run_single(options | LAYOUTS["8x1"], tmp_path / "one")
    values = options | RANKS | {"packing": packing, "run_id": "two"}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0"]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), json.dumps(values), str(tmp_path / "home")],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(first, tmp_path / "home" / "runs" / "two")
