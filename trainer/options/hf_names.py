"""What becomes of every argument of transformers' TrainingArguments that is no option of ours.

Each is passed on, or must keep the value that this trainer works with; a test holds this list against the installed
version.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from trainer.options.values import BadValue, flag

PASSED = frozenset(
    {
        "dataloader_num_workers",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "debug",
        "eval_delay",
        "eval_on_start",
        "full_determinism",
        "gradient_checkpointing_kwargs",
        "liger_kernel_config",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "lr_scheduler_kwargs",
        "optim_args",
        "optim_target_modules",
        "project",
        "save_on_each_node",
        "tf32",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "use_cpu",
        "use_liger_kernel",
    }
)

_EVALUATION = "evaluation computes the loss only"
_HUB = "nothing is uploaded; put the result into the registry with `python -m trainer publish`"
_OWN_PRECISION = "evaluation runs in the precision of training"

# name: (the one value, why no other)
FIXED: Mapping[str, tuple[Any, str]] = {
    "accelerator_config": (None, "the trainer sets it up"),
    "auto_find_batch_size": (False, "a batch size that changes in mid-run cannot be resumed; lower it by hand"),
    "average_tokens_across_devices": (True, "the loss is per token over all devices"),
    "batch_eval_metrics": (False, _EVALUATION),
    "bf16_full_eval": (False, _OWN_PRECISION),
    "data_seed": (None, "seed orders the rows too"),
    "dataloader_drop_last": (False, "every row is trained"),
    "dataloader_in_order": (True, "rows keep their order, so that a run can be repeated"),
    "do_predict": (False, "train does not predict"),
    "do_train": (True, "train trains; take `python -m trainer chat` to try a result"),
    "eval_accumulation_steps": (None, _EVALUATION),
    "eval_do_concat_batches": (True, _EVALUATION),
    "eval_use_gather_object": (False, _EVALUATION),
    "fp16_full_eval": (False, _OWN_PRECISION),
    "fsdp_config": (None, "fsdp=fsdp2 sets it"),
    "greater_is_better": (False, "the best checkpoint is the one with the lowest evaluation loss"),
    "hub_always_push": (False, _HUB),
    "hub_model_id": (None, _HUB),
    "hub_private_repo": (None, _HUB),
    "hub_revision": (None, _HUB),
    "hub_strategy": ("every_save", _HUB),
    "hub_token": (None, _HUB),
    "ignore_data_skip": (False, "a resumed run must see the rows that it has not seen"),
    "include_for_metrics": ([], _EVALUATION),
    "label_names": (None, "labels are made by the trainer"),
    "label_smoothing_factor": (0.0, "the loss is the plain cross-entropy"),
    "length_column_name": ("length", "the trainer knows the lengths"),
    "logging_nan_inf_filter": (False, "a loss that is no number must be seen"),
    "logging_strategy": ("steps", "set logging_steps"),
    "metric_for_best_model": ("eval_loss", "the best checkpoint is the one with the lowest evaluation loss"),
    "parallelism_config": (None, "set deepspeed or fsdp"),
    "prediction_loss_only": (True, _EVALUATION),
    "push_to_hub": (False, _HUB),
    "remove_unused_columns": (False, "the trainer makes all columns itself"),
    "restore_callback_states_from_checkpoint": (True, "early stopping goes on counting after a stop"),
    "save_only_model": (False, "a checkpoint without its optimizer cannot be resumed"),
    "save_safetensors": (True, "weights are safetensors only"),
    "skip_memory_metrics": (True, "it slows the run down"),
    "use_cache": (False, "with a cache, packed rows would see each other"),
}
# Names that transformers 5 no longer has; their values must leave things as they are.
GONE: Mapping[str, str] = {
    "fp16_backend": "auto",
    "fp16_opt_level": "O1",
    "half_precision_backend": "auto",
    "include_tokens_per_second": "False",
    "jit_mode_eval": "False",
    "past_index": "-1",
    "sharded_ddp": "",
    "use_ipex": "False",
    "use_mps_device": "False",
}


def check_fixed(name: str, value: Any) -> None:
    """Raises BadValue unless `value` is the one that the trainer works with."""
    accepted, why = FIXED[name]
    equal = _same(value, accepted) or (name == "metric_for_best_model" and value == "loss")
    if not equal:
        raise BadValue(f"only {_shown(accepted)} is possible: {why}")


def check_gone(name: str, value: Any) -> None:
    if not _same(value, GONE[name]):
        raise BadValue("this argument was removed from transformers; leave it out")


def passed_value(name: str, value: Any, kind: str) -> Any:
    """A value for TrainingArguments, of the kind that the table names. Raises BadValue."""
    if value is None or kind == "any":
        return yaml.safe_load(value) if isinstance(value, str) and value[:1] in "{[" else value
    if kind == "bool":
        return flag(value)
    if kind == "str":
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadValue("a number is expected") from None
    if kind == "float":
        return number
    if isinstance(value, bool) or number != int(number):
        raise BadValue("a whole number is expected")
    return int(number)


def _same(value: Any, accepted: Any) -> bool:
    if value in (None, "", [], {}) and accepted in (None, "", []):
        return True
    if isinstance(accepted, float) and not isinstance(value, bool):
        try:
            return float(value) == accepted
        except (TypeError, ValueError):
            return False
    return str(value).lower() == str(accepted).lower()


def _shown(value: Any) -> str:
    return "no value" if value in (None, [], "") else str(value).lower() if isinstance(value, bool) else str(value)
