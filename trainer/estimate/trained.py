"""How many numbers a method trains, and how many LoRA layers it puts on each linear layer.

Closed formulas for full, freeze and LoRA; every other method is counted on the architecture's own modules.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from trainer.config import TrainConfig
from trainer.estimate.shape import Linear, ModelShape
from trainer.methods.layer_names import ALL_LINEAR, resolve_targets

LORA = ("lora", "qlora")


@dataclass(frozen=True)
class Trained:
    """`num`: trainable numbers. `layers`: the last so many layers have gradients. `lora`: its linear layers.

    `trains_base`: those layers' own matrices and norms; `trains_head`: the output layer.
    """

    num: int
    layers: int
    trains_head: bool
    trains_base: bool = False
    lora: tuple[Linear, ...] = ()
    rank: int = 0


def trained_by(config: TrainConfig, shape: ModelShape, folder: Path) -> Trained:
    """Raises ConfigError where the method does not suit the architecture.

    LoRA (Hu et al. 2021, arXiv:2106.09685): rank * (inputs + outputs) for each layer it acts on; DoRA
    (arXiv:2402.09353) has one more number per output. Qwen2-7B, rank 8, all linear layers: 20,185,088.
    """
    method = config.finetuning_type
    if method == "full":
        return Trained(shape.num_parameters, shape.layers, trains_head=True, trains_base=True)
    if method == "freeze":
        count = min(config.freeze_trainable_layers, shape.layers)
        # Only where layers are known to be alike does one tell the others.
        num = count * shape.num_layer_parameters if shape.is_exact else _counted(config, folder)
        return Trained(num, count, trains_head=False, trains_base=True)
    lora = _targets(config, shape) if method in LORA else ()
    rank = config.lora_rank if lora else 0
    if lora and shape.is_exact and not _is_pattern(config, shape):
        each = sum(rank * (linear.inputs + linear.outputs) + config.use_dora * linear.outputs for linear in lora)
        return Trained(shape.layers * each, shape.layers, trains_head=False, lora=lora, rank=rank)
    return Trained(_counted(config, folder), shape.layers, trains_head=False, lora=lora, rank=rank)


def _counted(config: TrainConfig, folder: Path) -> int:
    """On the architecture's own modules."""
    from trainer.estimate.blank import count_trained

    return count_trained(folder, config)


def _targets(config: TrainConfig, shape: ModelShape) -> tuple[Linear, ...]:
    """PEFT's rule: one text is a pattern over whole dotted names, a list are ends of names."""
    wanted = resolve_targets(config.lora_target, shape.model_type)
    if wanted == ALL_LINEAR:
        return shape.linears
    if isinstance(wanted, str):
        return tuple(line for line in shape.linears if re.fullmatch(wanted, f"model.layers.0.{line.name}"))
    return tuple(line for line in shape.linears if any(f".{line.name}".endswith(f".{name}") for name in wanted))


def _is_pattern(config: TrainConfig, shape: ModelShape) -> bool:
    wanted = resolve_targets(config.lora_target, shape.model_type)
    return isinstance(wanted, str) and wanted != ALL_LINEAR
