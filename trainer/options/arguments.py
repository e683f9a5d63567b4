"""TrainConfig -> transformers' TrainingArguments, and what this machine decides: precision, checkpointing, devices."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from server.errors import ConfigError
from trainer.config import TrainConfig
from trainer.methods.base_model import DTYPES
from trainer.methods.plan import base_bits
from trainer.options.precision import base_format, checkpoints, uses_bf16
from trainer.options.zero import deepspeed_config
from trainer.runs.callbacks import ARGUMENTS

# Options whose names and meanings are the same there.
_SAME = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "fp16", "logging_steps"),
    *("eval_steps", "save_strategy", "save_steps", "load_best_model_at_end"),
)


def training_arguments(
    config: TrainConfig,
    folder: Path,
    *,
    validates: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> Any:
    """`kind`: a subclass, as TRL has them; `more` are its own. Raises ConfigError with transformers' reason."""
    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    values |= {
        "output_dir": str(folder),
        "eval_strategy": (config.eval_strategy or "steps") if validates else "no",
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "bf16": has_bf16(config),
        # The same numbers in one pass, without the copies that are as large as the weights.
        "optim": "adamw_torch_fused" if config.optim == "adamw_torch" else config.optim,
        "gradient_checkpointing": checkpoints_gradients(config),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "steps",
        "deepspeed": deepspeed_config(config.deepspeed) if config.deepspeed else None,
        **({"fsdp": True, "fsdp_config": {"version": 2}} if config.fsdp else {}),
        **_distributed(config),
        **ARGUMENTS,
        "report_to": [name for name in config.report_to if name != "tensorboard"] or "none",  # ours: trainer.runs.board
        **more,
        **config.hf_arguments,
    }
    if not validates:
        values["load_best_model_at_end"] = False
    try:
        return kind(**values)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ConfigError(f"transformers refuses these options: {str(error).strip()}") from error


def gpu_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def has_bf16(config: TrainConfig) -> bool:
    return uses_bf16(config, gpu_has_bf16=gpu_has_bf16())


def load_dtype(config: TrainConfig) -> torch.dtype:
    return DTYPES[base_format(config, gpu_has_bf16=gpu_has_bf16())]


def attention_of(config: TrainConfig) -> str | None:
    return None if config.attention == "auto" else config.attention


def checkpoints_gradients(config: TrainConfig) -> bool:
    return checkpoints(config, on_gpu=torch.cuda.is_available())


def loading(config: TrainConfig) -> Mapping[str, Any]:
    """How `load_base` is to load the base."""
    return {
        "dtype": load_dtype(config),
        "attention": attention_of(config),
        "bits": base_bits(config),
        "trust_remote_code": config.trust_remote_code,
    }


def _distributed(config: TrainConfig) -> dict[str, Any]:
    if config.fsdp and not torch.cuda.is_available():
        # accelerate would say nothing and train without it.
        raise ConfigError(
            f"fsdp={config.fsdp}: transformers shards weights on GPUs only; leave fsdp out, or use deepspeed"
        )
    if not torch.distributed.is_initialized():
        return {}
    values: dict[str, Any] = {"ddp_find_unused_parameters": False}
    if not torch.cuda.is_available():
        values["ddp_backend"] = "gloo"
    if config.fsdp:
        values["fsdp"] = True
        # FSDP wants to do the checkpointing itself.
        values["fsdp_config"] = {"version": 2, "activation_checkpointing": checkpoints_gradients(config)}
        values["gradient_checkpointing"] = False
    return values
