"""ppo's reward model: its own size, from where the trainer finds it, in the format it is loaded in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.store.home import Home
from tests.trainer.estimate.shapes import QWEN2_7B, QWEN2_HALF_B, small
from tests.trainer.estimate.test_counts import config_of, folder_of
from trainer.estimate.gate import check_fits
from trainer.estimate.models import RewardModel
from trainer.estimate.report import training_json, training_lines
from trainer.estimate.reserve import GIB
from trainer.estimate.room import Room
from trainer.estimate.rows import Rows
from trainer.estimate.training import Device
from trainer.estimate.verdict import TrainingEstimate, estimate_training, read_models, read_shape

COUNT = 494_032_768 + 896  # Qwen2-0.5B's tied weights and a score
GPUS = Room(1, 80 * GIB, 80 * GIB, "a GPU")
OLD, NEW = Device(on_cpu=False), Device(on_cpu=False, has_bf16=True)


def run_of(home: Home, name: str, record: dict[str, Any]) -> Path:
    folder = home.runs / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"state": "done", "config": {"stage": "rm"}, **record}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return folder_of(QWEN2_7B, tmp_path / "base")


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return folder_of(QWEN2_HALF_B, tmp_path / "half")


def found_with(base: Path, home: Home, reward: object, device: Device = NEW, **more: Any) -> TrainingEstimate:
    config = config_of(stage="ppo", reward_model=str(reward), **more)
    return estimate_training(config, base, GPUS, Rows(), device, read_models(config, base, home))


@pytest.mark.parametrize(
    ("device", "precision", "size"),
    [(NEW, {}, 2), (NEW, {"fp16": True}, 4), (NEW, {"bf16": False}, 4), (OLD, {}, 4), (OLD, {"bf16": True}, 2)],
)
def test_a_folder_is_counted_as_it_is_loaded(
    device: Device, precision: dict[str, Any], size: int, base: Path, half: Path, home: Home
) -> None:
    found = found_with(base, home, half, device, **precision)
    assert found.needs.others == size * COUNT
    assert found.not_judged == ""


def test_a_run_is_counted_with_what_it_left(base: Path, half: Path, home: Home) -> None:
    folder_of(QWEN2_HALF_B, run_of(home, "whole", {"output": "model"}) / "model")
    adapter = run_of(home, "adapter", {"output": "adapter", "base_path": str(half)}) / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 1000)
    assert found_with(base, home, "whole").needs.others == 2 * COUNT
    assert found_with(base, home, "adapter").needs.others == 2 * COUNT + 1000


@pytest.mark.parametrize("family", ["qwen2", "qwen2 untied", "gpt_neox"])
def test_the_size_is_that_of_the_scoring_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = folder_of(small(family), tmp_path / "m")
    real = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=1))
    shape = read_shape(folder)
    assert RewardModel(shape).bytes_in("fp32") == 4 * sum(weight.numel() for weight in real.parameters())
    assert RewardModel(shape, adapter=10).bytes_in("bf16") == RewardModel(shape).bytes_in("fp32") // 2 + 10


def test_a_small_reward_model_is_not_refused_as_if_it_were_large(base: Path, half: Path, home: Home) -> None:
    """Whole 7B in fp32 is 28 GiB; a reward model like it would be as much again."""
    room = Room(1, 34 * GIB, 80 * GIB, "a GPU")
    folder_of(QWEN2_HALF_B, run_of(home, "reward", {"output": "model"}) / "model")
    config = config_of(stage="ppo", reward_model="reward", per_device_train_batch_size=1, lora_rank=2)
    check_fits(config, base, [200] * 8, room, home)


@pytest.mark.parametrize("record", [None, {"state": "failed"}, {"config": {"stage": "sft"}}])
def test_one_that_is_not_there_is_left_to_training(record: dict[str, Any] | None, base: Path, home: Home) -> None:
    if record is not None:
        run_of(home, "reward", record)
    found = found_with(base, home, "reward")
    assert any("not judged: reward_model=reward" in line for line in training_lines(found, NEW, None, None))
    assert "reward_model=reward" in training_json(found, None, None)["not_judged"]
    check_fits(found.config, base, [200], Room(0, GIB, GIB, "1 GiB"), home)


def test_the_trainer_loads_it_in_that_format(tiny_model: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp16=true on a GPU that has bf16."""
    from trainer.stages import reward

    loaded: dict[str, Any] = {}
    monkeypatch.setattr(reward, "gpu_has_bf16", lambda: True)
    monkeypatch.setattr(reward, "load_base", lambda folder, **options: loaded.update(options))
    monkeypatch.setattr(reward, "_checked", lambda model, folder: torch.nn.Linear(1, 1))
    for precision, dtype in (({"fp16": True}, torch.float32), ({}, torch.bfloat16)):
        reward.load_reward(config_of(stage="ppo", reward_model=str(tiny_model), **precision), home)
        assert loaded["dtype"] == dtype
