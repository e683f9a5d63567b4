"""A run's bytes: by hand where a sum is short, and growing with what should make them grow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.estimate.shapes import QWEN2_7B, QWEN2_HALF_B
from tests.trainer.estimate.test_counts import config_of, folder_of
from trainer.estimate.activations import Pass
from trainer.estimate.ladder import rungs
from trainer.estimate.shape import shape_of
from trainer.estimate.training import Device, Needs, training_needs

GPU = Device(on_cpu=False, has_bf16=True)
CPU = Device(process=500 << 20)
COUNT = 494_032_768
HEAD = 151_936 * 896


def needs_of(
    tmp_path: Path, run: Pass, device: Device = CPU, values: dict[str, Any] = QWEN2_HALF_B, **more: Any
) -> Needs:
    shape = shape_of(values)
    assert shape
    return training_needs(config_of(**more), shape, folder_of(values, tmp_path / "m"), run, device)


def test_full_training_by_hand(tmp_path: Path) -> None:
    found = needs_of(tmp_path, Pass(1, 128), finetuning_type="full", gradient_accumulation_steps=1)
    assert found.weights == found.gradients == 4 * COUNT
    assert found.optimizer == 8 * COUNT
    assert found.adapter == found.others == 0
    # With short rows the peak is the end of the backward pass: all gradients, the tied embedding's twice.
    assert found.step - found.reserve == 16 * COUNT + 4 * HEAD


def test_a_second_forward_pass_of_a_step_stands_beside_all_gradients(tmp_path: Path) -> None:
    one = needs_of(tmp_path, Pass(1, 512), finetuning_type="full", gradient_accumulation_steps=1)
    two = needs_of(tmp_path, Pass(1, 512), finetuning_type="full", gradient_accumulation_steps=2)
    assert two.step > one.step
    assert two.step - two.reserve == 16 * COUNT + two.activations + two.loss


def test_lora_by_hand(tmp_path: Path) -> None:
    found = needs_of(tmp_path, Pass(1, 512), lora_rank=8)
    num = 24 * 8 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert found.num_trained == num
    assert (found.adapter, found.gradients, found.optimizer) == (4 * num, 4 * num, 8 * num)
    assert found.weights == 4 * COUNT
    assert needs_of(tmp_path, Pass(1, 512), GPU, lora_rank=8).weights == 2 * COUNT


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_more_tokens_and_more_rank_need_more(method: str, tmp_path: Path) -> None:
    def step(rows: int, width: int, **more: Any) -> int:
        return needs_of(tmp_path, Pass(rows, width), finetuning_type=method, **more).step

    assert step(1, 512) < step(2, 512) < step(4, 512)
    assert step(1, 512) < step(1, 1024) < step(1, 2048)
    assert step(4, 512, gradient_checkpointing=True) < step(4, 512)
    if method != "full":
        assert step(1, 512, lora_rank=8) < step(1, 512, lora_rank=16) < step(1, 512, lora_rank=64)


def test_methods_and_stages_in_their_order(tmp_path: Path) -> None:
    run = Pass(2, 512, is_packed=False)
    full, lora, qlora = (
        needs_of(tmp_path, run, GPU, QWEN2_7B, finetuning_type=method).peak for method in ("full", "lora", "qlora")
    )
    assert full > lora > qlora
    whole = needs_of(tmp_path, run, stage="dpo", finetuning_type="full")
    assert whole.others == 4 * COUNT  # the reference model
    adapter = needs_of(tmp_path, run, stage="dpo")
    assert adapter.others == 0 and adapter.adapter == 2 * 4 * adapter.num_trained
    ppo = needs_of(tmp_path, run, stage="ppo", finetuning_type="full", reward_model="r")
    assert ppo.others == 4 * COUNT + 4 * (COUNT + 896)  # the reference, and a reward model like it with a score


def test_reading_another_format_holds_the_file_beside_the_weights(tmp_path: Path) -> None:
    folder = folder_of(QWEN2_HALF_B, tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)
    assert needs_of(tmp_path, Pass(1, 32)).loading == 1000 + round(1000 * HEAD / COUNT)  # and the largest tensor
    assert needs_of(tmp_path, Pass(1, 32)).mapped == 1000
    assert needs_of(tmp_path, Pass(1, 32), bf16=True).loading == 0  # mapped, and used as it is
    assert needs_of(tmp_path, Pass(1, 32), GPU).loading == 0


def test_the_ladder_has_the_figures_of_the_zero_paper() -> None:
    """Figure 1 of arXiv:1910.02054: 7.5 billion parameters, 64 GPUs, K = 12."""
    count = 7_500_000_000
    empty = dict.fromkeys(("frozen", "adapter", "others", "activations", "loss", "rest"), 0)
    more = dict.fromkeys(("whole_logits", "reserve", "loading"), 0)
    needs = Needs(
        trained=4 * count, num_trained=count, gradients=4 * count, optimizer=8 * count, compute=2, **empty, **more
    )
    states = {
        rung.name: (rung.parts["weights"] + rung.parts["gradients"] + rung.parts["optimizer"]) / 1e9
        for rung in rungs(needs, needs, 64)
    }
    assert states["zero0"] == 120.0
    assert states["zero1"] == pytest.approx(31.4, abs=0.05)
    assert states["zero2"] == pytest.approx(16.6, abs=0.05)
    assert states["zero3"] == pytest.approx(1.9, abs=0.05)
    offloaded = {rung.name: rung for rung in rungs(needs, needs, 64)}
    assert offloaded["zero2_offload"].device < offloaded["zero2"].device
    assert offloaded["zero2_offload"].host >= 14 * count
    assert offloaded["zero3_offload"].host >= 16 * count


def test_quantized_weights_are_not_divided(tmp_path: Path) -> None:
    needs = needs_of(tmp_path, Pass(1, 512), GPU, QWEN2_7B, finetuning_type="qlora")
    assert [bool(rung.refused) for rung in rungs(needs, needs, 2)] == [False, False, False, False, True, True]


def test_an_optimizer_with_8_bits_is_smaller(tmp_path: Path) -> None:
    plain, small = (
        needs_of(tmp_path, Pass(1, 64), GPU, finetuning_type="full", optim=name)
        for name in ("adamw_torch", "adamw_8bit")
    )
    assert small.optimizer == round(COUNT * 2.03125)
    assert replace(plain, optimizer=small.optimizer, reserve=small.reserve).step == small.step
