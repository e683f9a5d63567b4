"""DeepSpeed's own engine on two CPU ranks: the weights are those of one process without it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from server.store.home import Home
from tests.services import ROOT
from trainer.config import TrainConfig
from trainer.runs.run_folder import read_lines
from trainer.train import train


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "chat.jsonl"
    rows = [{"instruction": f"q{n}", "output": "ab " * (1 + n % 5)} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(tiny_model),
        "train_file": str(data),
        "finetuning_type": "full",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_length": 128,
        "save_strategy": "no",
        "plot_loss": "false",
    }


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_two_ranks_with_zero_give_the_weights_of_one_process(
    options: dict[str, Any], tmp_path: Path, name: str
) -> None:
    values = options | {"train_file": (options["train_file"],), "per_device_train_batch_size": 4, "plot_loss": False}
    alone = train(TrainConfig(**values, run_id="alone"), Home(tmp_path).create()).path
    words = [f"{key}={value}" for key, value in options.items()]
    words += [f"deepspeed={name}", "num_processes=2", "run_id=two", "--home", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", *words], cwd=ROOT, capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "runs" / "two"
    assert losses(two) == pytest.approx(losses(alone), abs=1e-3)
    wanted, found = (load_file(run / "model" / "model.safetensors") for run in (alone, two))
    assert found.keys() == wanted.keys()
    # Adam makes rounding of tiny gradients large; a step moves a weight by 0.01.
    assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 2e-3
