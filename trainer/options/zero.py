"""DeepSpeed's ZeRO stages by name, as the dictionaries that transformers hands to DeepSpeed.

"auto" values are filled in from TrainingArguments. From fastest to leanest: zero0 (plain data parallel), zero1 (the
optimizer's state is split), zero2 (gradients too), zero2_offload (optimizer in main memory), zero3 (weights too),
zero3_offload. Source of the keys: DeepSpeed's configuration reference.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainConfig

ZERO_NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def deepspeed_config(name: str) -> dict[str, Any]:
    """The dictionary for `name`: one of ZERO_NAMES, or a JSON file, which is taken unchanged."""
    if name not in ZERO_NAMES:
        value: dict[str, Any] = json.loads(Path(name).expanduser().read_text(encoding="utf-8-sig"))
        return value
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "zero_optimization": _zero(int(name[4]), name.endswith("offload")),
    }


def deepspeed_notes(config: "TrainConfig") -> list[str]:
    """Which options a DeepSpeed file takes out of the trainer's hands."""
    if not config.deepspeed or config.deepspeed in ZERO_NAMES:
        return []
    value = deepspeed_config(config.deepspeed)
    return [
        f"{option}: has no effect, {config.deepspeed} names its own {section} ({value[section].get('type', '?')})"
        for section, option in (("scheduler", "lr_scheduler_type"), ("optimizer", "optim"))
        if isinstance(value.get(section), dict)
    ]


def _zero(stage: int, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        zero |= {
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "round_robin_gradients": True,
        }
    if stage == 3:
        zero |= {
            "overlap_comm": not offload,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero
