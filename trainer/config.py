"""What one training run can be told, declared once: name, type, range, default, help and plain other names.

Names are those of transformers' `TrainingArguments`, and LLaMA-Factory's for the methods. This module reads no file and
knows no machine: `trainer.options.resolve` makes a TrainConfig out of files and words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from server.settings import home_path
from trainer.errors import ConfigFaults
from trainer.options.checks import pair_faults


def _option(
    text: str,
    default: Any = None,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    also: str = "",
    whole: bool = False,
) -> Any:
    """`also`: other names of the same option. `whole`: a text is one entry of the list, its commas are its own."""
    meta = {
        "help": text,
        "least": least,
        "most": most,
        "above": above,
        "also": tuple(also.split()),
        "whole": whole,
    }
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Defaults suit LoRA on a model of some billion parameters; name your own where it matters.

    Raises ConfigFaults, which names every impossible pair.
    """

    # What is trained, on what
    model_name_or_path: str = _option(
        "Base model: a folder, the name of a model in the home, or a hub id.", "", also="model base_model"
    )
    train_file: tuple[str, ...] = _option(
        "Training data: files, folders, globs, or path#1000 for the first 1000 rows; a list or comma-separated.",
        (),
        also="data data_path dataset train_files datasets",
    )
    val_file: tuple[str, ...] = _option(
        "Validation data, as train_file.", (), also="eval_dataset validation_file eval_file val_dataset dev_file"
    )
    val_size: float = _option(
        "Rows held out of train_file: a share below 1, or a number of rows.",
        0.0,
        least=0.0,
        also="split_dataset_ratio val_set_size",
    )
    max_samples: int | None = _option("Take at most this many rows of each file.", least=1)
    max_reject_ratio: float = _option("A larger share of refused rows stops the run.", 0.05, least=0.0, most=1.0)
    replay_file: tuple[str, ...] = _option("General data mixed in, so that general ability is kept.", ())
    replay_ratio: float = _option("Share of replay rows among all rows.", 0.1, least=0.0, most=0.9)
    stage: Literal["pt", "sft", "dpo", "rm", "ppo"] = _option(
        "pt: all of a text. sft: answers. dpo, rm: preference pairs. ppo: against a reward.", "sft"
    )
    from_scratch: bool = _option("Start from random weights; the model folder then needs only its config.json.", False)
    trust_remote_code: bool = _option(
        "Run Python code that lies in the model's folder. Only of a source you know.", False
    )
    run_id: str | None = _option("Name of the run's folder. Unset: time and stage.", also="run_name")
    output_dir: str | None = _option("The run's folder. Unset: runs/RUN_ID in the home.")

    # Method
    finetuning_type: Literal[
        "full", "freeze", "lora", "qlora", "ptuning_v2", "prefix", "p_tuning", "prompt", "ia3", "peft"
    ] = _option("Which weights are trained; ptuning_v2 and prefix are one method.", "lora")
    lora_rank: int = _option("Rank of the LoRA matrices.", 16, least=1, also="lora_r")
    lora_alpha: int = _option("LoRA's scale is alpha / rank.", 32, least=1)
    lora_dropout: float = _option("Dropout before the LoRA matrices.", 0.05, least=0.0, most=0.99)
    lora_target: tuple[str, ...] = _option(
        "Module names that get LoRA; all-linear: every linear layer but the head.",
        ("all-linear",),
        also="lora_target_modules target_modules lora_modules",
    )
    lora_init: str = _option("How LoRA begins: default, or pissa, pissa_niter_16, olora, gaussian.", "")
    use_rslora: bool = _option("Scale by alpha / sqrt(rank).", False, also="use_rs_lora")
    use_dora: bool = _option("Learn directions and lengths apart (DoRA); vLLM cannot serve it.", False)
    pre_seq_len: int = _option(
        "Virtual tokens of ptuning_v2, prefix, p_tuning and prompt.", 128, least=1, also="num_virtual_tokens"
    )
    quantization_bit: Literal[4, 8] | None = _option(
        "Load the frozen base in nf4 (4) or int8 (8).", also="quant_bits quantize_bits"
    )
    peft_config: Mapping[str, Any] = _option(
        "Settings of any other method of peft, with its peft_type; such methods are not tested here.", {}
    )
    freeze_trainable_layers: int = _option(
        "finetuning_type=freeze: this many last layers are trained.", 2, least=1, also="num_layer_trainable"
    )

    # Steps
    num_train_epochs: float = _option("Passes over the data.", 3.0, above=0.0, also="num_epochs")
    max_steps: int = _option("Optimizer steps; -1: as num_train_epochs says.", -1, least=-1)
    per_device_train_batch_size: int = _option(
        "Rows per forward pass and device.", 1, least=1, also="per_gpu_train_batch_size micro_batch_size"
    )
    per_device_eval_batch_size: int = _option(
        "Rows per forward pass in evaluation.", 8, least=1, also="per_gpu_eval_batch_size"
    )
    gradient_accumulation_steps: int = _option("Forward passes per optimizer step.", 16, least=1)
    learning_rate: float = _option("Highest learning rate.", 1e-4, least=0.0)
    lr_scheduler_type: str = _option("How the learning rate goes on.", "cosine", also="lr_scheduler")
    warmup_steps: float = _option("Steps in which the learning rate rises; below 1: a share of all.", 0.03, least=0.0)
    weight_decay: float = _option("AdamW's weight decay.", 0.0, least=0.0)
    adam_beta1: float = _option("AdamW's memory of gradients.", 0.9, least=0.0, most=1.0)
    adam_beta2: float = _option(
        "AdamW's memory of squared gradients; 0.95 suits short runs.", 0.999, least=0.0, most=1.0
    )
    adam_epsilon: float = _option("AdamW's smallest divisor.", 1e-8, least=0.0)
    max_grad_norm: float = _option("Gradients are clipped to this norm; 0: not clipped.", 1.0, least=0.0)
    optim: str = _option("Optimizer.", "adamw_torch", also="optimizer")
    seed: int = _option("The same seed on the same machine gives the same weights.", 42, least=0)

    # Rows and loss
    max_length: int = _option(
        "Longest row in tokens; longer ones lose their oldest turns (pt: the text is cut here).",
        2048,
        least=2,
        also="max_seq_length cutoff_len model_max_length sequence_len max_seq_len block_size",
    )
    max_source_length: int | None = _option(
        "Longest question in tokens, beside max_length.", least=1, also="max_source_len"
    )
    max_target_length: int | None = _option(
        "Longest answer in tokens, beside max_length.", least=1, also="max_target_len"
    )
    packing: bool | None = _option(
        "Several rows in one sequence, unseen by each other. Unset: as the stage and the method allow."
    )
    loss_on: Literal["assistant", "last", "all"] = _option(
        "What is learned: every answer, the last answer, or every token.", "assistant"
    )
    neftune_noise_alpha: float | None = _option("Noise on embeddings while training (NEFTune); 5 is usual.", least=0.0)

    # Preferences (dpo, ppo)
    pref_beta: float = _option(
        "DPO: how firmly the answers stay near the base model's.", 0.1, above=0.0, also="dpo_beta"
    )
    pref_loss: Literal["sigmoid", "hinge", "ipo"] = _option("DPO's loss.", "sigmoid", also="dpo_loss")
    reward_model: str | None = _option("PPO: the run or folder of a reward model (stage rm).")
    ppo_epochs: int = _option("PPO: passes over each batch of answers.", 4, least=1)
    ppo_kl: float = _option("PPO: price of drifting from the base model.", 0.1, least=0.0)
    ppo_max_new_tokens: int = _option("PPO: longest answer in tokens.", 128, least=1)

    # Memory and speed
    bf16: bool | None = _option("bfloat16. Neither bf16 nor fp16 set: bf16 where a GPU has it, else fp32.")
    fp16: bool = _option("float16 with loss scaling, for GPUs older than Ampere.", False)
    gradient_checkpointing: bool | None = _option(
        "Recompute instead of store. Unset: on with a GPU where the method allows it.", also="activation_checkpointing"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = _option(
        "auto: sdpa. eager keeps all scores, which a CPU does faster for short rows.",
        "auto",
        also="attn_implementation",
    )
    deepspeed: str | None = _option(
        "zero0, zero1, zero2, zero2_offload, zero3, zero3_offload, or a DeepSpeed JSON file."
    )
    fsdp: Literal["fsdp2"] | None = _option("fsdp2: weights, gradients and optimizer split over the GPUs.")
    num_processes: int | None = _option(
        "Processes on this machine. Unset: one per GPU.", least=1, also="num_gpus nproc_per_node n_gpu nproc"
    )
    memory_check: bool = _option("Refuse a run that surely will not fit before anything is loaded.", True)
    cpu_ok: bool = _option("Without a GPU, replace the settings that need one, and say which.", False)

    # Watching, keeping
    logging_steps: int = _option("Steps between two lines of metrics.jsonl.", 10, least=1)
    eval_strategy: Literal["no", "steps", "epoch"] | None = _option(
        "When to evaluate. Unset: every eval_steps where there is validation data.", also="evaluation_strategy"
    )
    eval_steps: float = _option("Steps between evaluations; below 1: a share of all steps.", 0.05, above=0.0)
    eval_tasks: tuple[str, ...] = _option(
        "What `eval --task` takes (mmlu/, identity=NAME, likelihood=held_out.jsonl): asked of an engine before the "
        "first step, at each evaluation and at the end.",
        (),
    )
    eval_task_limit: int | None = _option("Ask at most so many items of each of eval_tasks; none: all.", 100, least=1)
    save_strategy: Literal["no", "steps", "epoch"] = _option("When to write a checkpoint.", "steps")
    save_steps: float = _option(
        "Steps between checkpoints; below 1: a share of all steps.", 0.05, above=0.0, also="save_interval"
    )
    save_total_limit: int | None = _option("Keep this many checkpoints; unset: all.", 3, least=1)
    load_best_model_at_end: bool = _option("The result is the checkpoint with the lowest evaluation loss.", False)
    early_stopping_patience: int = _option(
        "Stop after this many evaluations without a better loss; 0: never.", 0, least=0, also="early_stopping_steps"
    )
    sample_prompts: tuple[str, ...] = _option(
        "Questions answered at each evaluation: a list, or a .txt file with one per line.", (), whole=True
    )
    plot_loss: bool = _option("Draw the curves when the run ends.", True)
    report_to: tuple[str, ...] = _option("Also report to: tensorboard.", ())
    disable_tqdm: bool = _option("No progress bar.", False)
    resume: str = _option(
        "auto: go on with the run of this name if there is one. never: do not. Or a checkpoint.", "auto"
    )
    resume_override: bool = _option("Resume although data, base or settings have changed.", False)
    hf_arguments: Mapping[str, Any] = _option(
        "Further arguments of transformers' TrainingArguments, by their names.", {}
    )

    def __post_init__(self) -> None:
        faults = pair_faults(self)
        if faults:
            raise ConfigFaults(faults)


def default_home() -> Path:
    """QLOOP_HOME as the server resolves it."""
    return home_path()
