"""A LoRA adapter folder in PEFT's format -> checked matrices, without importing peft.

Every way in which serving it would differ from what was trained is an AdapterError that names the fault and the cure.
Knows nothing about batches or about what is loaded.
"""

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.lora import LoraLinear

log = logging.getLogger(__name__)

WEIGHT_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
RETRAIN = "train it without that option"
REFUSED_OPTIONS: dict[str, str] = {
    "use_dora": "merge it into the base model",
    "use_qalora": RETRAIN,
    "modules_to_save": "merge it into the base model, or train it without modules_to_save",
    "lora_bias": "train it with lora_bias=False",
    "fan_in_fan_out": RETRAIN,
    "trainable_token_indices": "merge it into the base model",
    "target_parameters": "merge it into the base model",
    "layer_replication": RETRAIN,
    "alora_invocation_tokens": RETRAIN,
}


@dataclass(frozen=True)
class LoraMatrices:
    """One module's part of an adapter: `a` is `[rank, in]`, `b` is `[out, rank]` with the scaling folded in."""

    a: Tensor
    b: Tensor


def read_lora(folder: Path, model: nn.Module) -> dict[str, LoraMatrices]:
    """The adapter's matrices by module name, in the dtype and on the device of the module they add to."""
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    pairs = _pair(folder, tensors)
    matrices = {name: _checked(folder, config, name, pair, model) for name, pair in pairs.items()}
    if not any(bool(matrix.b.any()) for matrix in matrices.values()):
        log.warning("the adapter in %s changes nothing: all its B matrices are zero (was it trained?)", folder)
    return matrices


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{folder} has no adapter_config.json. Name the folder that training wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}). Copy the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        method = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: peft_type is {method!r}; the hf backend serves LORA only. Train a LoRA adapter.")
    for option, cure in REFUSED_OPTIONS.items():
        if config.get(option):
            raise AdapterError(f"{path}: {option}={config[option]!r} cannot be served; {cure}.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias={config['bias']!r} cannot be served; train it with bias='none'.")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise AdapterError(f"{path}: r and lora_alpha must be numbers. Copy the adapter again.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        hint = " Save it as safetensors; pickled .bin files are never read." if list(folder.glob("*.bin")) else ""
        raise AdapterError(f"{folder} has no adapter_model.safetensors.{hint} Name the folder that training wrote.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is cut short or damaged ({error}). Copy the adapter again.") from error


def _pair(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The A and B tensor of every module."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = WEIGHT_KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{folder}: the tensor {key!r} is not a LoRA weight of a linear layer. Merge the adapter instead."
            )
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    if not pairs:
        raise AdapterError(f"{folder}: adapter_model.safetensors holds no LoRA weights. Train or copy it again.")
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise AdapterError(f"{folder}: {name} has only lora_{next(iter(pair))}. Copy the adapter again.")
    return pairs


def _checked(
    folder: Path, config: dict[str, Any], name: str, pair: dict[str, Tensor], model: nn.Module
) -> LoraMatrices:
    linear = _target(folder, name, model)
    a, b = pair["A"], pair["B"]
    rank = int(_by_pattern(config.get("rank_pattern"), name, config["r"]))
    expected = [(rank, linear.in_features), (linear.out_features, rank)]
    if [tuple(a.shape), tuple(b.shape)] != expected:
        raise AdapterError(
            f"{folder}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, but this model and rank {rank} need "
            f"{expected[0]} and {expected[1]}. The adapter belongs to another base model."
        )
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    weight = linear.weight
    a, b = a.to(weight), (b.to(torch.float32) * scaling).to(weight)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterError(f"{folder}: {name} holds NaN or infinity. The training run failed; train again.")
    return LoraMatrices(a, b)


def _target(folder: Path, name: str, model: nn.Module) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise AdapterError(
            f"{folder}: this model has no module {name!r}. The adapter belongs to another base model."
        ) from error
    if isinstance(module, LoraLinear):
        module = module.base
    if not isinstance(module, nn.Linear):
        raise AdapterError(f"{folder}: {name} is a {type(module).__name__}, not a linear layer. Merge the adapter.")
    return module


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: a key matches the whole name or its last dotted parts."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default
