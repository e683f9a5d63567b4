"""Which modules an adapter must have weights for: as PEFT itself decides, and never where that cannot be told."""

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.adapter_files import ModelShape, model_shape, read_adapter
from server.engine.backends.hf.adapter_targets import adapted_modules
from tests.server.engine.backends.families import FAMILIES, load
from tests.server.engine.backends.peft_adapters import fill

MODULES = [
    *(f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")),
    *(f"model.layers.1.mlp.experts.{i}.up_proj" for i in range(3)),
    *(f"transformer.h.{i}.attn.c_proj" for i in range(3)),
    "layers.0.self_attn.q_proj",
    "score.not_q_proj",
    "lm_head",
]
# Each leaves some modules of a Qwen3 with three layers alone.
PARTS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "up_proj"]},
    "pattern": {"target_modules": r".*\.layers\.[02]\.mlp\.(up|down)_proj"},
    "excluded names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
    "excluded pattern": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.2\..*"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
}
MORE: dict[str, dict[str, Any]] = {
    "all of them": {"target_modules": r".*"},
    "a beginning": {"target_modules": r"model\.layers\.1\.mlp\.up_proj|model|lm"},
    "layers by two lists": {
        "target_modules": ["q_proj", "c_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "no layers named": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers, and a whole name": {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", [*PARTS.values(), *MORE.values()], ids=[*PARTS, *MORE])
def test_they_are_those_that_peft_matches(options: dict[str, Any]) -> None:
    config = LoraConfig(**options)
    expected = [name for name in MODULES if check_target_module_exists(config, name)]
    assert adapted_modules(options, MODULES) == expected and expected


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": "("},
        {"target_modules": 3},
        {"target_modules": ["q_proj"], "layers_to_transform": "1"},
        {"target_modules": ["q_proj"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_what_cannot_be_told_asks_for_nothing(config: dict[str, Any]) -> None:
    assert adapted_modules(config, MODULES) == []


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["Qwen3"].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shape(model_folder: Path) -> ModelShape:
    return model_shape(load(model_folder), 256)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_model_may_be_adapted_but_not_a_part_of_that(
    part: str, model_folder: Path, shape: ModelShape, tmp_path: Path
) -> None:
    adapted = get_peft_model(load(model_folder), LoraConfig(r=2, **PARTS[part]))
    fill(adapted)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    found = list(read_adapter(tmp_path, shape).lora)
    assert 1 < len(found) < 21
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.clone() for key, tensor in load_file(weights).items() if found[-1] not in key}, weights)
    with pytest.raises(AdapterError, match=rf"no weights for {re.escape(found[-1])}, .*Copy it again, or train"):
        read_adapter(tmp_path, shape)
