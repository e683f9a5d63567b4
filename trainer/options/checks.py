"""Which options exclude each other, which need another, and whether what they name is there. Knows no machine."""

import glob
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.options.zero import ZERO_NAMES

if TYPE_CHECKING:
    from trainer.config import TrainConfig

PREFIX_METHODS = ("ptuning_v2", "prefix")
PROMPT_METHODS = (*PREFIX_METHODS, "p_tuning", "prompt")
WHOLE_METHODS = ("full", "freeze")  # they change the base model's own weights
TRL_STAGES = ("dpo", "rm")
PAIR_STAGES = (*TRL_STAGES, "ppo")  # TRL's or our own loops, which do not pack
# option: the methods or stages that read it
ONLY_FOR_METHODS = {
    ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "lora_init", "use_rslora", "use_dora"): (
        "lora",
        "qlora",
    ),
    ("pre_seq_len",): PROMPT_METHODS,
    ("freeze_trainable_layers",): ("freeze",),
    ("peft_config",): ("peft",),
}
# Schedules of transformers that have no defaults for these, of which one is enough.
SCHEDULE_OPTIONS = {
    "cosine_with_min_lr": ("min_lr_rate", "min_lr"),
    "cosine_warmup_with_min_lr": ("min_lr_rate", "min_lr"),
    "warmup_stable_decay": ("num_decay_steps",),
}
_WITHOUT_PPO = ("pt", "sft", "dpo", "rm")  # it neither evaluates nor keeps checkpoints
ONLY_FOR_STAGES = {
    ("pref_beta", "pref_loss"): ("dpo",),
    ("reward_model", "ppo_epochs", "ppo_kl", "ppo_max_new_tokens"): ("ppo",),
    ("loss_on",): ("sft",),
    ("neftune_noise_alpha",): ("pt", "sft"),
    ("max_source_length", "max_target_length"): ("sft", "dpo", "rm"),
    ("sample_prompts",): ("pt", "sft", "dpo", "ppo"),
    ("eval_tasks", "eval_task_limit"): ("pt", "sft", "dpo"),  # an engine serves no reward model
    ("val_file", "val_size", "eval_strategy", "load_best_model_at_end", "early_stopping_patience"): _WITHOUT_PPO,
    ("save_strategy", "save_total_limit"): _WITHOUT_PPO,
}


def pair_faults(config: "TrainConfig") -> list[str]:
    """One line for everything that is missing or cannot go together."""
    rules = (*_missing(config), *_method_rules(config), *_memory_rules(config), *_watching_rules(config))
    return [line for is_wrong, line in rules if is_wrong]


def given_faults(config: "TrainConfig", given: Iterable[str]) -> list[str]:
    """Options that somebody set although this run would not read them."""
    names = set(given)
    faults = []
    for options, methods in ONLY_FOR_METHODS.items():
        if config.finetuning_type not in methods:
            faults += [
                f"{name} with finetuning_type={config.finetuning_type}: only {', '.join(methods)} read it; leave it "
                f"out, or take finetuning_type={methods[0]}"
                for name in options
                if name in names
            ]
    for options, stages in ONLY_FOR_STAGES.items():
        if config.stage not in stages:
            faults += [
                f"{name} with stage={config.stage}: only stage {', '.join(stages)} reads it; leave it out"
                for name in options
                if name in names
            ]
    if "replay_ratio" in names and not config.replay_file:
        faults.append("replay_ratio without replay_file: name the general data with replay_file")
    if "eval_task_limit" in names and not config.eval_tasks:
        faults.append("eval_task_limit without eval_tasks: name the tasks with eval_tasks")
    return faults


def place_faults(config: "TrainConfig") -> list[str]:
    """Files and folders that are named and not there. Hub ids and models in the home are the loader's affair."""
    faults = []
    for name in ("train_file", "val_file", "replay_file"):
        faults += [
            f"{name}: {pattern}: no such file or folder" for pattern in getattr(config, name) if not _is_there(pattern)
        ]
    faults += [f"sample_prompts: {fault}" for entry in config.sample_prompts if (fault := _text_fault(entry))]
    model = Path(config.model_name_or_path).expanduser()
    looks_like_path = config.model_name_or_path.startswith((".", "/", "~")) or config.model_name_or_path.count("/") > 1
    if looks_like_path and not model.is_dir():
        faults.append(f"model_name_or_path: {config.model_name_or_path}: no such folder")
    if config.resume not in ("auto", "never") and not Path(config.resume).expanduser().is_dir():
        faults.append(
            f"resume: {config.resume}: no such folder; accepted are auto, never, a checkpoint or a run's folder"
        )
    if config.deepspeed and config.deepspeed not in ZERO_NAMES:
        faults += _deepspeed_faults(config.deepspeed)
    return faults


def _is_there(pattern: str) -> bool:
    path, mark, count = pattern.rpartition("#")
    plain = path if mark and count.isdigit() else pattern
    expanded = str(Path(plain).expanduser())
    return Path(expanded).exists() or bool(glob.glob(expanded, recursive=True))


def _text_fault(entry: str) -> str | None:
    """Why a .txt file of questions cannot be read."""
    if not entry.endswith(".txt"):
        return None
    try:
        Path(entry).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        return f"{entry} cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return f"{entry} is not UTF-8 text"
    return None


def _deepspeed_faults(name: str) -> list[str]:
    try:
        value: Any = json.loads(Path(name).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        return [f"deepspeed: {name}: {error.strerror}; accepted are {', '.join(ZERO_NAMES)} or a DeepSpeed JSON file"]
    except ValueError as error:
        return [f"deepspeed: {name}: is not valid JSON ({error})"]
    return [] if isinstance(value, dict) else [f"deepspeed: {name}: a JSON object is expected"]


Rules = list[tuple[bool, str]]


def _missing(c: "TrainConfig") -> Rules:
    return [
        (
            not c.model_name_or_path,
            "model_name_or_path is not set: name a folder or a hub id, for example "
            "model_name_or_path=Qwen/Qwen2-0.5B-Instruct",
        ),
        (not c.train_file, "train_file is not set: name one or more data files, for example train_file=train.jsonl"),
        (
            c.stage == "ppo" and not c.reward_model,
            "stage=ppo without reward_model: train one with stage=rm, then name its run",
        ),
        (
            c.finetuning_type == "peft" and "peft_type" not in c.peft_config,
            "finetuning_type=peft without a peft_type in peft_config, for example "
            'peft_config={"peft_type": "OFT", "r": 8}',
        ),
    ]


def _method_rules(c: "TrainConfig") -> Rules:
    method = c.finetuning_type
    return [
        (
            c.from_scratch and method != "full",
            f"from_scratch=true with finetuning_type={method}: an adapter on random weights learns nothing of use; "
            "take finetuning_type=full",
        ),
        (
            c.from_scratch and c.stage in PAIR_STAGES,
            f"from_scratch=true with stage={c.stage}: random weights have no answers to prefer; train with stage=pt "
            "and stage=sft first",
        ),
        (
            c.quantization_bit is not None and method in WHOLE_METHODS,
            f"quantization_bit={c.quantization_bit} with finetuning_type={method}: quantized weights cannot be "
            "trained; take finetuning_type=qlora, or leave quantization_bit out",
        ),
        (
            method in PREFIX_METHODS and c.gradient_checkpointing is True,
            f"gradient_checkpointing=true with finetuning_type={method}: the prefix is a cache, which recomputing "
            "loses; set gradient_checkpointing=false",
        ),
        (
            method in PROMPT_METHODS and c.packing is True,
            f"packing=true with finetuning_type={method}: packed rows would share one prompt; set packing=false",
        ),
        (
            c.stage in PAIR_STAGES and c.packing is True,
            f"packing=true with stage={c.stage}: pairs are not packed; set packing=false",
        ),
        (
            c.use_dora and c.lora_init.startswith("pissa"),
            "use_dora=true with lora_init=pissa: take one of the two",
        ),
        (
            c.stage == "ppo" and bool(c.deepspeed or c.fsdp or (c.num_processes or 1) > 1),
            "stage=ppo trains in one process: leave deepspeed, fsdp and num_processes out",
        ),
        (
            c.stage == "ppo" and c.ppo_max_new_tokens >= c.max_length,
            f"ppo_max_new_tokens={c.ppo_max_new_tokens} with max_length={c.max_length} leaves no room for a question",
        ),
        *_schedule_rules(c),
        (c.max_steps == 0, "max_steps=0 trains nothing: take -1 for num_train_epochs, or a number of steps"),
    ]


def _schedule_rules(c: "TrainConfig") -> Rules:
    given = c.hf_arguments.get("lr_scheduler_kwargs") or {}
    return [
        (
            c.lr_scheduler_type == name and not set(options) & set(given),
            f'lr_scheduler_type={name} needs {" or ".join(options)}: set lr_scheduler_kwargs={{"{options[0]}": ...}}',
        )
        for name, options in SCHEDULE_OPTIONS.items()
    ]


def _memory_rules(c: "TrainConfig") -> Rules:
    return [
        (c.bf16 is True and c.fp16, "bf16=true with fp16=true: take one of the two"),
        (bool(c.deepspeed) and bool(c.fsdp), f"deepspeed={c.deepspeed} with fsdp={c.fsdp}: take one of the two"),
        (
            c.fsdp is not None and c.fp16,
            "fp16=true with fsdp=fsdp2: FSDP has no loss scaling here; take bf16=true, or deepspeed=zero3",
        ),
    ]


def _watching_rules(c: "TrainConfig") -> Rules:
    has_validation = bool(c.val_file) or c.val_size > 0
    evaluates = has_validation and c.eval_strategy != "no"
    steps_differ = (
        c.save_strategy == "steps"
        and c.eval_strategy in (None, "steps")
        and (c.save_steps % c.eval_steps if c.save_steps >= 1 <= c.eval_steps else c.save_steps != c.eval_steps) != 0
    )
    return [
        (bool(c.val_file) and c.val_size > 0, "val_file with val_size: take one of the two"),
        (c.val_size > 1 and c.val_size != int(c.val_size), f"val_size={c.val_size}: a share below 1 or a whole number"),
        (
            c.eval_strategy in ("steps", "epoch") and not has_validation and not c.eval_tasks,
            f"eval_strategy={c.eval_strategy} without validation data: set val_file or val_size, or eval_tasks",
        ),
        (
            c.hf_arguments.get("eval_on_start") is True and not evaluates,
            "eval_on_start=true without evaluation: set val_file or val_size",
        ),
        (
            c.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and not evaluates,
            f"lr_scheduler_type={c.lr_scheduler_type} without evaluation: set val_file or val_size",
        ),
        (
            c.load_best_model_at_end and not evaluates,
            "load_best_model_at_end=true without evaluation: set val_file or val_size",
        ),
        (
            c.load_best_model_at_end and evaluates and (c.eval_strategy or "steps") != c.save_strategy,
            f"load_best_model_at_end=true with eval_strategy={c.eval_strategy or 'steps'} and "
            f"save_strategy={c.save_strategy}: they must be equal",
        ),
        (
            c.load_best_model_at_end and evaluates and steps_differ,
            f"load_best_model_at_end=true with save_steps={c.save_steps:g} and eval_steps={c.eval_steps:g}: "
            "save_steps must be a multiple of eval_steps",
        ),
        (
            c.early_stopping_patience > 0 and not evaluates,
            f"early_stopping_patience={c.early_stopping_patience} without evaluation: set val_file or val_size",
        ),
    ]
