"""Adapter folders, checked before vLLM sees them: a request with one that it cannot read would kill its engine core.

Reads PEFT's format as the hf backend does, against the model's shape without weights.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.backends.base import AdapterError
from server.engine.backends.hf.adapter_files import ModelShape, model_shape, read_adapter
from server.store.model_folder import read_json_object
from server.store.servability import VLLM_RANKS, largest_rank

log = logging.getLogger("qloop.engine")

USE_HF = "serve it with QLOOP_ENGINE=hf"


def model_shape_of(folder: Path, max_len: int, trust_remote_code: bool) -> ModelShape | None:
    """Names and sizes of the model's linear maps; None where transformers cannot build the model."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
        return replace(model_shape(model, max_len), device=torch.device("cpu"))
    except Exception as error:  # whatever a foreign model's code raises
        log.warning("adapters are checked by vLLM alone, transformers cannot build this model: %s", error)
        return None


def check_adapter(path: Path, shape: ModelShape | None, max_rank: int) -> None:
    """Raise AdapterError with the cure unless vLLM will compute what PEFT computes."""
    config_path = path / "adapter_config.json"
    if not config_path.is_file():
        raise AdapterError(f"{path} has no adapter_config.json. Name the folder that training wrote.")
    config = read_json_object(config_path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; vLLM serves LoRA only: {USE_HF}.")
    rank = largest_rank(config)
    if rank > max_rank:
        raise AdapterError(f"{path}: its rank is {rank}, this engine was started for at most {max_rank}. {_cure(rank)}")
    if not (path / "adapter_model.safetensors").is_file():
        raise AdapterError(f"{path} has no adapter_model.safetensors. Pickled .bin files are never read.")
    if shape is not None:
        read_adapter(path, shape)


def _cure(rank: int) -> str:
    if rank > VLLM_RANKS[-1]:
        return f"Merge it into the base model, or {USE_HF}."
    return f"Restart the engine with QLOOP_MAX_ADAPTER_RANK={rank} or more."
