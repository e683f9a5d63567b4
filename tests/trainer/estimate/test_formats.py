"""Formats are the trainer's own, and what is saved in few bits is counted in few bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.estimate.shapes import QWEN2_HALF_B, small
from tests.trainer.estimate.test_counts import config_of, folder_of
from trainer.estimate.activations import Pass
from trainer.estimate.gate import check_fits
from trainer.estimate.ladder import rungs
from trainer.estimate.reserve import GIB
from trainer.estimate.room import Room
from trainer.estimate.training import Device, load_format, numbers_of, training_needs
from trainer.estimate.verdict import read_shape
from trainer.estimate.weights import SHORT_NAMES, weight_bytes
from trainer.options.arguments import checkpoints_gradients, has_bf16, load_dtype

RUN = Pass(1, 128)
MACHINES = {"cpu": (False, False), "gpu": (True, False), "gpu with bf16": (True, True)}
PRECISIONS: tuple[dict[str, bool], ...] = ({}, {"fp16": True}, {"bf16": True}, {"bf16": False})
SAVED: tuple[tuple[int, dict[str, Any], str], ...] = (
    (4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
    (8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
)


@pytest.fixture(params=MACHINES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A machine as torch shows it to the trainer, and as the estimate is told of it."""
    on_gpu, bf16 = MACHINES[request.param]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    return Device(not on_gpu, bf16)


@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_formats_are_those_that_the_trainer_takes(
    precision: dict[str, bool], method: str, device: Device, tmp_path: Path
) -> None:
    config = config_of(finetuning_type=method, **precision)
    folder = folder_of(small("qwen2"), tmp_path / "m")
    shape, numbers = read_shape(folder), numbers_of(config, device)
    dtype = load_dtype(config)
    assert load_format(config, shape, device) == (SHORT_NAMES[str(dtype).removeprefix("torch.")],) * 2
    assert (numbers.base, numbers.is_mixed) == (dtype.itemsize, has_bf16(config) or config.fp16)
    told = replace(config, gradient_checkpointing=checkpoints_gradients(config))
    assert training_needs(config, shape, folder, RUN, device) == training_needs(told, shape, folder, RUN, device)


@pytest.mark.parametrize(("bits", "quantized", "number"), SAVED)
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_a_base_that_is_saved_quantized_is_loaded_so(
    family: str, bits: int, quantized: dict[str, Any], number: str, tmp_path: Path
) -> None:
    device = Device(on_cpu=False, has_bf16=True)
    plain = folder_of(small(family), tmp_path / "plain")
    saved = folder_of({**small(family), "quantization_config": quantized}, tmp_path / "saved")
    needs = training_needs(config_of(), read_shape(saved), saved, RUN, device)
    assert needs.weights == weight_bytes(read_shape(plain), number, kept="bf16")
    assert needs == training_needs(config_of(quantization_bit=bits), read_shape(plain), plain, RUN, device)
    assert [bool(rung.refused) for rung in rungs(needs, needs, 2)] == [False, False, False, False, True, True]


def test_a_base_that_is_saved_quantized_is_not_refused_as_if_it_were_whole(tmp_path: Path) -> None:
    room = Room(1, 7 * GIB // 4, 8 * GIB, "a small GPU")
    check_fits(config_of(), folder_of({**QWEN2_HALF_B, "quantization_config": SAVED[0][1]}, tmp_path / "m"), [8], room)
