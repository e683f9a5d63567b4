"""A DeepSpeed file is the rung that it says, and what it cannot say is not refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError
from tests.trainer.estimate.shapes import QWEN2_HALF_B
from tests.trainer.estimate.test_counts import config_of, folder_of
from trainer.errors import DoesNotFit
from trainer.estimate.gate import check_fits
from trainer.estimate.report import training_json, training_lines
from trainer.estimate.reserve import GIB
from trainer.estimate.room import Room
from trainer.estimate.rows import Rows
from trainer.estimate.training import Device
from trainer.estimate.verdict import TrainingEstimate, estimate_training
from trainer.estimate.zero_plan import ZeroPlan, zero_plan
from trainer.options.zero import ZERO_NAMES

GPU = Device(on_cpu=False, has_bf16=True)
ROOM = Room(4, 24 * GIB, 64 * GIB, "4 GPUs")
CPU, NVME, NONE = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/d"}, {"device": "none"}
FILES: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "zero0"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": CPU}}, "zero0"),
    ({"zero_optimization": {"stage": 1}}, "zero1"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": NONE}}, "zero2"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}, "zero2_offload"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": CPU, "offload_param": CPU}}, "zero2_offload"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero2_offload"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": None}}, "zero3"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}}, "zero3_offload"),
)


def file_of(value: dict[str, Any], folder: Path) -> str:
    file = folder / "ds.json"
    file.write_text(json.dumps(value))
    return str(file)


def found_with(deepspeed: str, tmp_path: Path, room: Room = ROOM) -> TrainingEstimate:
    config = config_of(finetuning_type="full", deepspeed=deepspeed)
    return estimate_training(config, folder_of(QWEN2_HALF_B, tmp_path / "m"), room, Rows(), GPU)


@pytest.mark.parametrize("name", ZERO_NAMES)
def test_a_name_is_its_own_rung(name: str) -> None:
    assert zero_plan(name).name == name


@pytest.mark.parametrize(("value", "name"), FILES)
def test_a_file_is_the_rung_that_it_says(value: dict[str, Any], name: str, tmp_path: Path) -> None:
    found = found_with(file_of(value, tmp_path), tmp_path)
    assert found.chosen == next(rung for rung in found.rungs if rung.name == name)
    assert found.bytes == found_with(name, tmp_path).bytes


def test_what_a_file_leaves_on_the_gpu_is_counted_there(tmp_path: Path) -> None:
    """ZeRO-3 with only the optimizer in main memory lies between two rungs of the ladder."""
    only = {"zero_optimization": {"stage": 3, "offload_optimizer": CPU}}
    found = found_with(file_of(only, tmp_path), tmp_path).chosen
    plain, both = (found_with(name, tmp_path).chosen for name in ("zero3", "zero3_offload"))
    assert found and plain and both
    assert both.device < found.device < plain.device
    assert plain.host == 0 < found.host < both.host
    assert found.parts["weights"] == plain.parts["weights"] and found.parts["optimizer"] == 0


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_nvme_is_not_judged(key: str, tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, key: NVME}
    file = file_of({"zero_optimization": zero}, tmp_path)
    tiny = Room(4, GIB // 4, GIB // 4, "4 small GPUs")
    base = folder_of(QWEN2_HALF_B, tmp_path / "m")
    check_fits(config_of(finetuning_type="full", deepspeed=file), base, [100] * 32, tiny)
    with pytest.raises(DoesNotFit):
        check_fits(config_of(finetuning_type="full", deepspeed="zero3_offload"), base, [100] * 32, tiny)
    found = found_with(file, tmp_path, tiny)
    assert any("not judged: " in line and "NVMe" in line for line in training_lines(found, GPU, None, None))
    assert "NVMe" in training_json(found, None, None)["not_judged"]


def test_the_check_judges_a_file_by_what_it_says(tmp_path: Path) -> None:
    """On one GPU stage 2 with offload takes less than stage 3 without, on eight stage 3 less than stage 1."""
    base = folder_of(QWEN2_HALF_B, tmp_path / "m")
    one, eight = Room(1, 9 * GIB, 64 * GIB, "a GPU"), Room(8, 7 * GIB, GIB, "8 GPUs")

    def check(zero: dict[str, Any], room: Room) -> None:
        file = file_of({"zero_optimization": zero}, tmp_path)
        check_fits(config_of(finetuning_type="full", deepspeed=file), base, [100] * 32, room)

    check({"stage": 2, "offload_optimizer": CPU}, one)
    check({"stage": 3}, eight)
    for zero, room in (({"stage": 3}, one), ({"stage": 1}, eight)):
        with pytest.raises(DoesNotFit):
            check(zero, room)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 4}, "stage=4"),
        ({"stage": "auto"}, "stage='auto'"),
        (True, "stage=True"),
        ({"stage": 2, "offload_optimizer": {"device": "tape"}}, "offload_optimizer=.*tape"),
        ({"stage": 2, "offload_optimizer": "cpu"}, "offload_optimizer=cpu"),
    ],
)
def test_what_deepspeed_would_refuse_is_named(zero: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        zero_plan(file_of({"zero_optimization": zero}, tmp_path))


def test_a_plan_knows_its_name() -> None:
    assert ZeroPlan(1, "cpu").name == "zero1_offload"
    assert not ZeroPlan(3).uses_nvme and ZeroPlan(3, "nvme").uses_nvme
