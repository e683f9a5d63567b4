"""Other tools' options -> ours: older transformers, LLaMA-Factory, Firefly, DeepSpeed-Chat, ms-swift, Qwen, ChatGLM.

Plain other names stand beside the option itself, in `trainer.config`; here is whatever also changes the value. A rule
turns one value into our options.
"""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.options.values import BadValue, flag

Rule = Callable[[Any], Mapping[str, Any]]

# Shell constants of the scripts that this family of tools ships. Only the ones that name an option.
CONSTANTS = {
    "PRE_SEQ_LEN": "pre_seq_len",
    "LR": "learning_rate",
    "NUM_GPUS": "num_processes",
    "MAX_SEQ_LEN": "max_length",
    "MAX_SOURCE_LEN": "max_source_length",
    "MAX_TARGET_LEN": "max_target_length",
    "DEV_BATCH_SIZE": "per_device_train_batch_size",
    "GRAD_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "MAX_STEP": "max_steps",
    "SAVE_INTERVAL": "save_steps",
    "AUTORESUME_FROM_CHECKPOINT": "resume_from_checkpoint",
    "RUN_NAME": "run_name",
    "OUTPUT_DIR": "output_dir",
    "BASE_MODEL_PATH": "model_name_or_path",
    "DATASET_PATH": "train_file",
}

# option: {another tool's value: ours}; values are compared in lower case
VALUES: Mapping[str, Mapping[str, Any]] = {
    "optim": {"adamw_hf": "adamw_torch", "adamw": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"},
    "stage": {"pretrain": "pt", "rlhf": "ppo", "reward": "rm"},
    "finetuning_type": {
        "p-tuning-v2": "ptuning_v2",
        "p_tuning_v2": "ptuning_v2",
        "prefix_tuning": "prefix",
        "p-tuning": "p_tuning",
        "ptuning": "p_tuning",
        "prompt_tuning": "prompt",
    },
    "lora_target": {"all": "all-linear"},
    "attention": {"fa2": "flash_attention_2", "disabled": "eager", "off": "eager"},
    "deepspeed": {"zero2-offload": "zero2_offload", "zero3-offload": "zero3_offload"},
    "report_to": {"none": ()},
    "resume": {"true": "auto", "false": "never"},
    "lora_init": {"true": "", "default": ""},
    "save_total_limit": {"-1": None},
    "max_samples": {"-1": None},
}
# Methods of peft beside those that are tested: finetuning_type=vera means peft_config={"peft_type": "VERA"}.
OTHER_METHODS = ("adalora", "boft", "fourierft", "hra", "ln_tuning", "loha", "lokr", "miss", "oft", "randlora", "vera")


def translate_value(key: str, value: Any) -> dict[str, Any]:
    """Our own option's value in our own words; most pass as they are."""
    word = str(value).lower()
    if key == "finetuning_type" and word in OTHER_METHODS:
        return {"finetuning_type": "peft", "peft_config": {"peft_type": word.upper()}}
    if key == "fsdp":
        return {"fsdp": _fsdp(value)}
    return {key: VALUES.get(key, {}).get(word, value)}


def _fsdp(value: Any) -> Any:
    """The strings of FSDP 1 ask for what FSDP 2 does in its one way."""
    if value in (None, False, "", "false", []):
        return None
    words = value if isinstance(value, str) else " ".join(map(str, value)) if isinstance(value, list) else "true"
    if words in ("true", "True") or set(words.replace(",", " ").split()) <= {"full_shard", "auto_wrap", "fsdp2"}:
        return "fsdp2"
    return value


def _when(**options: Any) -> Rule:
    """A switch: the options if it is on, nothing if it is off."""
    return lambda value: options if flag(value) else {}


def _either(on: Mapping[str, Any], off: Mapping[str, Any]) -> Rule:
    return lambda value: on if flag(value) else off


def _only(accepted: Any, why: str) -> Rule:
    """The one value that this trainer works with."""

    def rule(value: Any) -> Mapping[str, Any]:
        if str(value).lower() != str(accepted).lower() and not (accepted is None and value in ("", [], {})):
            raise BadValue(why)
        return {}

    return rule


def _warmup_ratio(value: Any) -> Mapping[str, Any]:
    try:
        share = float(value)
    except (TypeError, ValueError):
        raise BadValue("a share between 0 and 1 is expected") from None
    if not 0 <= share < 1:
        raise BadValue("a share between 0 and 1 is expected; for a number of steps set warmup_steps")
    return {"warmup_steps": share}


def _lora_dim(value: Any) -> Mapping[str, Any]:
    return {} if str(value) == "0" else {"finetuning_type": "lora", "lora_rank": value}


def _lora_module_name(value: Any) -> Mapping[str, Any]:
    """DeepSpeed-Chat picks layers whose name contains the text; all layers of a decoder lie under one of these."""
    whole = str(value).rstrip(".") in ("decoder.layers", "model.layers", "layers", "transformer.h")
    return {"lora_target": "all-linear" if whole else value}


def _zero_stage(value: Any) -> Mapping[str, Any]:
    if str(value) not in ("0", "1", "2", "3"):
        raise BadValue("accepted are 0, 1, 2, 3")
    return {"deepspeed": f"zero{value}"}


def _precision(value: Any) -> Mapping[str, Any]:
    names: dict[str, Mapping[str, Any]] = {
        "auto": {},
        "bf16": {"bf16": True},
        "bfloat16": {"bf16": True},
        "fp16": {"fp16": True},
        "float16": {"fp16": True},
        "half": {"fp16": True},
        "fp32": {"bf16": False},
        "float32": {"bf16": False},
    }
    if str(value) not in names:
        raise BadValue(f"accepted are {', '.join(names)}")
    return names[str(value)]


def _resume(value: Any) -> Mapping[str, Any]:
    if value in (None, ""):
        return {"resume": "auto"}
    return {"resume": VALUES["resume"].get(str(value).lower(), value)}


_LORA, _QLORA = {"finetuning_type": "lora"}, {"finetuning_type": "qlora"}

RULES: Mapping[str, Rule] = {
    # older transformers
    "warmup_ratio": _warmup_ratio,
    "no_cuda": lambda value: {"hf_arguments": {"use_cpu": flag(value)}},
    "resume_from_checkpoint": _resume,
    "overwrite_output_dir": _either({"resume": "never"}, {}),
    # methods
    "use_lora": _when(**_LORA),
    "q_lora": _when(**_QLORA),
    "use_qlora": _when(**_QLORA),
    "train_mode": lambda value: translate_value("finetuning_type", value),
    "tuner_type": lambda value: translate_value("finetuning_type", value),
    "train_type": lambda value: translate_value("finetuning_type", value),
    "adapter": lambda value: {"finetuning_type": value or "full"},
    "lora_dim": _lora_dim,
    "only_optimize_lora": _either({}, {"finetuning_type": "full"}),
    "lora_module_name": _lora_module_name,
    "load_in_4bit": _when(quantization_bit=4),
    "load_in_8bit": _when(quantization_bit=8),
    "pissa_init": _when(lora_init="pissa"),
    "init_lora_weights": lambda value: {"lora_init": VALUES["lora_init"].get(str(value).lower(), value)},
    "precision": _precision,
    "torch_dtype": _precision,
    "flash_attn": lambda value: translate_value("attention", value),
    # loss and rows
    "mask_history": _when(loss_on="last"),
    "train_on_prompt": _when(loss_on="all"),
    "neat_packing": _when(packing=True),
    "enable_liger_kernel": lambda value: {"hf_arguments": {"use_liger_kernel": flag(value)}},
    "task_type": lambda value: {} if str(value).upper() == "CAUSAL_LM" else translate_value("stage", value),
    "pref_ftx": _only(0.0, "is not supported; DPO's loss stands alone"),
    # DeepSpeed by number
    "zero_stage": _zero_stage,
}

# Rules whose option may stand without a value on a command line.
SWITCH_RULES = frozenset(
    [
        "enable_liger_kernel",
        "group_by_length",
        "load_in_4bit",
        "load_in_8bit",
        "mask_history",
        "neat_packing",
        "no_cuda",
        "only_optimize_lora",
        "overwrite_cache",
        "overwrite_output_dir",
        "pissa_init",
        "q_lora",
        "train_on_prompt",
        "use_lora",
        "use_qlora",
        "efficient_eos",
        "offload",
        "double_quantization",
        "lazy_preprocess",
    ]
)

_RENDERER = "the model's own chat template is used: what is trained is what will be served"
_DETECTED = "the shape of every row is detected"
_STREAMED = "rows are streamed; nothing is cached"
_ORDERED = "the trainer shuffles the rows by seed, and puts rows of like length into one step"
_PLANNED = "the trainer plans its batches itself"
_LAUNCHED = "the processes are started by the trainer itself"

# Accepted, with nothing to do; the text is printed.
NOTED: Mapping[str, str] = {
    "template": _RENDERER,
    "template_name": _RENDERER,
    "chat_template": _RENDERER,
    "train_format": _DETECTED,
    "train_file_format": _DETECTED,
    "overwrite_cache": _STREAMED,
    "preprocessing_num_workers": _STREAMED,
    "preprocessing_batch_size": _STREAMED,
    "lazy_preprocess": _STREAMED,
    "data_output_path": _STREAMED,
    "local_rank": _LAUNCHED,
    "group_by_length": _ORDERED,
    "train_sampling_strategy": _ORDERED,
    "dataloader_multiprocessing_context": _PLANNED,
    "dataloader_persistent_workers": _PLANNED,
    "dataloader_pin_memory": _PLANNED,
    "dataloader_prefetch_factor": _PLANNED,
    "include_num_input_tokens_seen": "the trainer counts tokens itself",
    "logging_dir": "TensorBoard's files lie in the run's folder",
    "do_eval": "evaluation runs where there is validation data",
    "enable_jit_checkpoint": "a checkpoint is always written before a stop",
    "efficient_eos": "every answer ends in its stop token",
    "double_quantization": "nf4 always quantizes its constants too",
    "bnb_4bit_use_double_quant": "nf4 always quantizes its constants too",
}
