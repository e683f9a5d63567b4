"""The check before training: what it asks the machine, what it leaves out, and that it never ends a run by accident."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.options.arguments  # noqa: F401  # before torch is given GPUs: transformers asks it while it is imported
from tests.trainer.estimate.shapes import QWEN2_HALF_B, SMALL
from tests.trainer.estimate.test_counts import config_of, folder_of
from trainer.errors import DoesNotFit
from trainer.estimate import gate
from trainer.estimate.gate import check_fits
from trainer.estimate.reserve import GIB
from trainer.estimate.room import Room
from trainer.estimate.rows import Rows
from trainer.estimate.training import Device
from trainer.estimate.verdict import estimate_training
from trainer.machine import Machine

LENGTHS = [100] * 32
FULL = config_of(finetuning_type="full", gradient_accumulation_steps=1)
ODD_MODEL = """
from transformers import PreTrainedConfig, PreTrainedModel


class OddConfig(PreTrainedConfig):
    model_type = "odd"


class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        raise AssertionError("no meta device, please")
"""


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return folder_of(QWEN2_HALF_B, tmp_path / "half")


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A machine with four GPUs of 24 GiB, as torch shows it; the list: what it was asked for memory."""
    asked: list[tuple[Any, ...]] = []

    def mem_get_info(*device: Any) -> tuple[int, int]:
        asked.append(device)
        return 24 * GIB, 24 * GIB

    monkeypatch.setattr("trainer.machine.find_machine", lambda: Machine(("GPU",) * 4))
    monkeypatch.setattr("trainer.estimate.room.available_memory", lambda: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    return asked


def test_a_rank_asks_its_own_gpu_only(four_gpus: list[tuple[Any, ...]], half: Path) -> None:
    """A context on each of the others would take memory from the ranks that train there."""
    check_fits(FULL, half, LENGTHS)
    assert four_gpus == [()]


def test_ranks_refuse_together(four_gpus: list[tuple[Any, ...]], half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds the GPU of the second rank; the first would else load its weights and wait for it."""

    def gather(found: list[int], mine: int) -> None:
        found[:] = [mine, 1]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(DoesNotFit):
        check_fits(FULL, half, LENGTHS)


def test_main_memory_is_that_of_one_machine(
    four_gpus: list[tuple[Any, ...]], half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 with offload takes 11 GiB of all machines together; 7 are free on this one, which may be one of two."""
    offload = config_of(finetuning_type="full", deepspeed="zero3_offload")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, mine: None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_fits(offload, half, LENGTHS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(DoesNotFit, match=r"11\.0 GiB of main memory"):
        check_fits(offload, half, LENGTHS)


def test_offload_is_divided_by_the_machines(half: Path) -> None:
    def host(machines: int) -> int:
        room = Room(16, GIB, GIB, "16 GPUs", machines)
        found = estimate_training(config_of(deepspeed="zero3_offload"), half, room, Rows(), Device(on_cpu=False))
        assert found.chosen
        return found.chosen.host

    assert host(2) * 2 == pytest.approx(host(1), abs=2)
    assert host(4) * 4 == pytest.approx(host(1), abs=4)


def test_an_architecture_that_surprises_the_estimate_is_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**SMALL, "model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    values["auto_map"]["AutoModelForCausalLM"] = "odd.OddModel"
    folder = folder_of(values, tmp_path / "odd")
    (folder / "odd.py").write_text(ODD_MODEL)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    check_fits(config_of(trust_remote_code=True), folder, LENGTHS, Room(0, GIB, GIB, "1 GiB"))
    assert "AssertionError: no meta device, please" in caplog.text
    caplog.clear()


def test_a_cure_that_cannot_be_found_leaves_the_refusal(
    half: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise IndexError("no such layer")

    monkeypatch.setattr(gate, "find_cure", fails)
    with pytest.raises(DoesNotFit, match=r"this run will not fit: .* no setting of ours makes it fit"):
        check_fits(FULL, half, LENGTHS, Room(0, GIB, GIB, "1 GiB"))
    assert "IndexError: no such layer" in caplog.text
    caplog.clear()


def test_pages_of_the_weight_file_are_no_reason_to_refuse(half: Path) -> None:
    """They count in a process' size, and so in what is printed, but the kernel drops them when memory is short."""
    with (half / "model.safetensors").open("wb") as file:
        file.truncate(4 * GIB)  # takes no room on the disk
    config, room = config_of(gradient_accumulation_steps=1), Room(0, 4 * GIB, 4 * GIB, "4 GiB")
    found = estimate_training(config, half, room, Rows(tuple(LENGTHS)), Device())
    assert found.bytes > 6 * GIB and not found.fits
    assert found.bytes - found.least_bytes == pytest.approx(4 * GIB, rel=0.5)
    check_fits(config, half, LENGTHS, room)
    with pytest.raises(DoesNotFit):
        check_fits(config, half, LENGTHS, Room(0, 2 * GIB, 2 * GIB, "2 GiB"))
