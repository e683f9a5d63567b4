"""What the trainer decides where a configuration leaves it open: number formats and gradient checkpointing.

The rules alone, of a configuration and what a GPU can do: `trainer.options.arguments` asks them for the machine that
trains, `trainer.estimate` for the one that was named. Formats have torch's names. Imports nothing heavy.
"""

from typing import TYPE_CHECKING

from trainer.options.checks import PROMPT_METHODS, WHOLE_METHODS

if TYPE_CHECKING:
    from trainer.config import TrainConfig


def uses_bf16(config: "TrainConfig", *, gpu_has_bf16: bool) -> bool:
    """Whether matrix products are in bfloat16."""
    automatic = gpu_has_bf16 and not config.fp16
    return automatic if config.bf16 is None else config.bf16


def base_format(config: "TrainConfig", *, gpu_has_bf16: bool) -> str:
    """Trained weights stay in float32, autocast does the rest; frozen ones may be of 16 bits."""
    if config.finetuning_type in WHOLE_METHODS:
        return "float32"
    return "bfloat16" if uses_bf16(config, gpu_has_bf16=gpu_has_bf16) else "float16" if config.fp16 else "float32"


def reward_format(config: "TrainConfig", *, gpu_has_bf16: bool) -> str:
    """Of ppo's reward model, which is never loaded in float16."""
    return "bfloat16" if uses_bf16(config, gpu_has_bf16=gpu_has_bf16) else "float32"


def checkpoints(config: "TrainConfig", *, on_gpu: bool) -> bool:
    """Whether the backward pass computes activations again instead of keeping them."""
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing
    return on_gpu and config.finetuning_type not in PROMPT_METHODS
