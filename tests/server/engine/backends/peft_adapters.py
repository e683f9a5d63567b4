"""One adapter of every method that the hf backend serves, made and saved by PEFT itself with weights that matter.

Whether PEFT supports a method for a family is found out by trying: what it raises passes through.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from tests.server.engine.backends.families import Family, load

_TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def _wide_lora(family: Family) -> PeftConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=family.has_conv1d, **_TASK)


def _narrow_lora(family: Family) -> PeftConfig:
    targets = list(family.attention)
    return LoraConfig(
        r=8, lora_alpha=8, use_rslora=True, target_modules=targets, fan_in_fan_out=family.has_conv1d, **_TASK
    )


def _ia3(family: Family) -> PeftConfig:
    inputs = list(family.feed_forward)
    return IA3Config(
        target_modules=[*family.attention, *inputs],
        feedforward_modules=inputs,
        fan_in_fan_out=family.has_conv1d,
        **_TASK,
    )


def _prefix(family: Family) -> PeftConfig:
    return PrefixTuningConfig(num_virtual_tokens=5, **_TASK)


def _projected_prefix(family: Family) -> PeftConfig:
    return PrefixTuningConfig(num_virtual_tokens=9, prefix_projection=True, encoder_hidden_size=16, **_TASK)


def _p_tuning(family: Family) -> PeftConfig:
    return PromptEncoderConfig(num_virtual_tokens=6, encoder_hidden_size=24, **_TASK)


def _prompt_tuning(family: Family) -> PeftConfig:
    return PromptTuningConfig(num_virtual_tokens=4, **_TASK)


METHODS: dict[str, Callable[[Family], PeftConfig]] = {
    "LoRA": _wide_lora,
    "rsLoRA": _narrow_lora,
    "IA3": _ia3,
    "prefix tuning": _prefix,
    "prefix tuning, projected": _projected_prefix,
    "P-tuning": _p_tuning,
    "prompt tuning": _prompt_tuning,
}


def write_adapter(folder: Path, family: Family, model_folder: Path, method: str) -> Path:
    """Make, fill and save an adapter."""
    torch.manual_seed(list(METHODS).index(method))
    adapted = get_peft_model(load(model_folder), METHODS[method](family))
    fill(adapted)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@torch.no_grad()
def fill(adapted: Any) -> None:
    """Random weights, large enough to change the text."""
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.3)
        elif "ia3_l" in name:
            weight.uniform_(0.2, 1.8)
        elif "prompt_encoder" in name:
            weight.normal_(std=0.5)


def load_adapted(model_folder: Path, adapter_folder: Path) -> Any:
    """The model as PEFT runs it with the adapter."""
    return PeftModel.from_pretrained(load(model_folder), str(adapter_folder)).eval()
