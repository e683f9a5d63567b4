"""Parameters, trained numbers and bytes: against models that were really made, and against sums done by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.errors import ConfigError
from tests.trainer.estimate.shapes import FAMILIES, QWEN2_7B, QWEN2_HALF_B, small
from trainer.config import TrainConfig
from trainer.estimate.blank import blank_shape, count_trained
from trainer.estimate.shape import EXACT, shape_of
from trainer.estimate.trained import trained_by
from trainer.estimate.training import state_bytes
from trainer.estimate.weights import weight_bytes
from trainer.methods.apply import decoder_layers

METHODS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 2},
    "lora": {"lora_rank": 8},
    "lora some": {"lora_rank": 4, "lora_target": ("q_proj", "v_proj", "down_proj")},
    "lora attention": {"lora_rank": 4, "lora_target": ("attention",)},
    "lora pattern": {"lora_rank": 4, "lora_target": (r".*layers\.[01]\.self_attn\.q_proj",)},
    "dora": {"lora_rank": 4, "use_dora": True},
    "pissa": {"lora_rank": 4, "lora_init": "pissa"},
    "olora": {"lora_rank": 4, "lora_init": "olora"},
    "prefix": {"finetuning_type": "prefix", "pre_seq_len": 8},
    "prompt": {"finetuning_type": "prompt", "pre_seq_len": 8},
    "p_tuning": {"finetuning_type": "p_tuning", "pre_seq_len": 8},
    "ia3": {"finetuning_type": "ia3"},
}


def config_of(**more: Any) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", train_file=("d",), **more)


def folder_of(values: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def model_of(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_published_sizes() -> None:
    seven, half = shape_of(QWEN2_7B), shape_of(QWEN2_HALF_B)
    assert seven and half
    assert seven.num_parameters == 7_615_616_512
    assert half.num_parameters == 494_032_768
    assert trained_by(config_of(lora_rank=8), seven, Path()).num == 20_185_088


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    values = small(family)
    folder = folder_of(values, tmp_path / "m")
    model = model_of(folder)
    shape = shape_of(values) or blank_shape(folder, values)
    assert shape.is_exact == (values["model_type"] in EXACT)
    assert shape.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert blank_shape(folder, values).num_parameters == shape.num_parameters


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_last_layers_of_a_model_whose_layers_differ(count: int, tmp_path: Path) -> None:
    values = small("qwen2_moe")
    folder = folder_of(values, tmp_path / "m")
    layers = model_of(folder).model.layers
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    assert sizes[0] != sizes[1]
    config = config_of(finetuning_type="freeze", freeze_trainable_layers=count)
    assert trained_by(config, blank_shape(folder, values), folder).num == sum(sizes[-count:])


@pytest.mark.parametrize("names", [("num_hidden_layers",), ("num_layers",), ()])
def test_layers_are_found_by_either_name_of_their_number(names: tuple[str, ...]) -> None:
    """ChatGLM's config has num_layers."""
    from torch import nn

    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    model.config = SimpleNamespace(model_type="x", **dict.fromkeys(names, 3))  # type: ignore[assignment]
    if names:
        assert decoder_layers(model) is model.layers
        return
    with pytest.raises(ConfigError, match="no list of its layers in this x model"):
        decoder_layers(model)


@pytest.mark.parametrize("method", METHODS)
def test_trained_numbers_are_those_of_the_method(method: str, tmp_path: Path) -> None:
    from trainer.methods.apply import apply_method, describe

    values = small("qwen2")
    folder, config, shape = folder_of(values, tmp_path / "m"), config_of(**METHODS[method]), shape_of(values)
    assert shape
    real = describe(apply_method(model_of(folder), config)).num_trained
    assert trained_by(config, shape, folder).num == real
    assert count_trained(folder, config) == real


def test_bytes_by_hand() -> None:
    shape = shape_of(QWEN2_HALF_B)
    assert shape
    count = 494_032_768
    assert weight_bytes(shape, "fp32") == 4 * count
    assert weight_bytes(shape, "bf16") == weight_bytes(shape, "fp16") == 2 * count
    linear = 24 * (896 * 896 * 2 + 2 * 896 * 128 + 3 * 896 * 4864)
    rows = 24 * (896 * 2 + 2 * 128 + 2 * 4864 + 896)
    assert weight_bytes(shape, "int8", kept="bf16") == 2 * (count - linear) + linear + 4 * rows
    nf4 = weight_bytes(shape, "nf4", kept="bf16") - 2 * (count - linear)
    assert 0.51 < nf4 / linear < 0.52  # 4 bits, 8 / 64 of the constants, 32 / 16384 of theirs
    assert [state_bytes(name) for name in ("adamw_torch", "sgd", "adamw_8bit")] == [8.0, 0.0, 2.03125]


@pytest.mark.parametrize(("bits", "number"), [(4, "nf4"), (8, "int8")])
def test_quantized_bytes_are_those_of_bitsandbytes(bits: int, number: str, tmp_path: Path) -> None:
    from trainer.methods.base_model import load_base

    values = {**small("qwen2"), "hidden_size": 256, "intermediate_size": 640}
    folder = folder_of(values, tmp_path / "m")
    model_of(folder).save_pretrained(folder)
    import torch

    model, shape = load_base(folder, dtype=torch.float32, bits=bits), shape_of(values)
    assert shape
    real = sum(_bytes(weight) for weight in {id(weight): weight for weight in model.parameters()}.values())
    assert weight_bytes(shape, number, kept="fp32") == pytest.approx(real, rel=1e-3)


def _bytes(weight: Any) -> int:
    """A parameter with the constants that bitsandbytes keeps for it."""
    state = getattr(weight, "quant_state", None)
    more = [] if state is None else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    more += [weight.SCB] if getattr(weight, "SCB", None) is not None else []
    return sum(part.numel() * part.element_size() for part in (weight.data, *more))


def test_a_shape_without_its_sizes_is_a_named_error() -> None:
    with pytest.raises(ConfigError, match="intermediate_size"):
        shape_of({**QWEN2_7B, "intermediate_size": None})
