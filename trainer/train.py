"""One training run, from config to a saved model or adapter in its run folder.

Reading order: `train` -> `_examples` -> `_load_model` -> `_fit` -> `_save`. The loop is transformers' Trainer; this
module adds what it lacks: labels from the server's renderer, a ledger, a stop at the first NaN, self-described output.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from server.errors import ConfigError
from server.store.hashes import file_hash, text_hash, weights_hash
from server.store.home import Home
from server.store.model_folder import read_model_config, resolve_model
from server.text.render import ChatRenderer
from trainer.config import TrainConfig
from trainer.formats import Reject, read_rows
from trainer.labels import IGNORED, Example, chat_examples, text_examples
from trainer.run_folder import RunFolder

# Whatever describes the text side is copied byte for byte, so that training cannot make it drift.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
# CPU matrix kernels are compiled per shape: with few shapes they are compiled once, else at almost every step.
LENGTH_STEP = 16
LOGITS_STEP = 64


class TrainingFailed(Exception):
    """A run that cannot go on: the loss is not a number, or there is nothing to learn."""


def train(config: TrainConfig, home: Home, *, title: str | None = None) -> RunFolder:
    """Run to the end. Raises ConfigError for bad input and TrainingFailed for a bad run; run.json says which."""
    # A run shows one bar of its own.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    base = resolve_model(config.model, home)
    read_model_config(base)
    run = RunFolder.create(home.runs, config)
    try:
        _train(config, base, run, title or config.stage)
    except KeyboardInterrupt:
        run.finish("stopped")
        raise
    except Exception as error:
        run.finish("failed", error=f"{type(error).__name__}: {error}")
        raise
    return run


def _train(config: TrainConfig, base: Path, run: RunFolder, title: str) -> None:
    examples, rejects = _examples(config, base)
    run.write_ledger(rejects)
    run.record(
        base_path=str(base),
        base_weights_hash="" if config.from_scratch else weights_hash(base),
        dataset_hash=dataset_hash(config.data),
        num_examples=len(examples),
        num_rejected=len(rejects),
        num_trained_tokens=sum(label != IGNORED for example in examples for label in example.labels),
    )
    if not examples:
        raise TrainingFailed(f"no usable row in {', '.join(config.data)}: see {run.path / 'rejects.jsonl'}")
    set_seed(config.seed)
    model = _load_model(config, base)
    loss = _fit(config, model, examples, run, title, _pad_id(base))
    _save(config, model, base, run)
    run.finish("done", train_loss=loss, output="model" if config.finetuning == "full" else "adapter")


def dataset_hash(files: Sequence[str]) -> str:
    """sha256 over the contents of the training files, in order."""
    return text_hash("".join(file_hash(Path(file)) for file in files))


def _examples(config: TrainConfig, base: Path) -> tuple[list[Example], list[Reject]]:
    rows = chain.from_iterable(read_rows(Path(file), config.stage) for file in config.data)
    renderer = ChatRenderer.load(base)
    if config.stage == "pt":
        return text_examples(rows, renderer, _pad_id(base), config.max_length)
    return chat_examples(rows, renderer, config.max_length)


def _pad_id(base: Path) -> int:
    """The id that pads batches and separates texts: `pad_token_id`, else the (first) end-of-text id."""
    config = read_model_config(base)
    for key in ("pad_token_id", "eos_token_id"):
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    raise ConfigError(f"{base / 'config.json'}: has neither pad_token_id nor eos_token_id; set one of them")


def _has_bf16(config: TrainConfig) -> bool:
    automatic = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.precision == "bf16" or (config.precision == "auto" and automatic)


def _load_model(config: TrainConfig, base: Path) -> Any:
    attention = None if config.attention == "auto" else config.attention
    if config.from_scratch:
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.from_pretrained(base), dtype=torch.float32, attn_implementation=attention
        )
    else:
        # Trained weights stay in float32 under bf16 autocast; frozen ones may be bf16.
        frozen = config.finetuning == "lora" and _has_bf16(config)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16 if frozen else torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
        )
    if config.finetuning == "full":
        return model
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
        ),
    )


def _fit(config: TrainConfig, model: Any, examples: list[Example], run: RunFolder, title: str, pad_id: int) -> float:
    steps_per_epoch = math.ceil(len(examples) / (config.batch_size * config.gradient_accumulation))
    trainer = _StrictTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(run.path),
            num_train_epochs=config.num_epochs,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler,
            warmup_steps=math.ceil(config.warmup_ratio * config.num_epochs * steps_per_epoch),
            weight_decay=config.weight_decay,
            adam_beta2=config.adam_beta2,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            bf16=_has_bf16(config),
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length",
            logging_strategy="steps",
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=_rows_of(examples),
        data_collator=lambda batch: collate(batch, pad_id),
        callbacks=[_Progress(run, title)],
    )
    trainer.remove_callback(PrinterCallback)
    return float(trainer.train().training_loss)


def _rows_of(examples: list[Example]) -> Any:
    return [{"input_ids": example.token_ids, "labels": example.labels} for example in examples]


def collate(batch: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest row, rounded up: int64 tensors of shape [rows, length]."""
    length = _rounded(max(len(row["input_ids"]) for row in batch), LENGTH_STEP)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in batch]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in batch]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in batch]),
    }


def _rounded(number: int, step: int) -> int:
    return math.ceil(number / step) * step


class _StrictTrainer(Trainer):
    """Computes logits only where something is learned; stops before a loss that is not finite reaches the weights."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy per trained token of the whole step. In a chat most tokens are not trained."""
        labels = inputs.pop("labels")[:, 1:].flatten()
        learned = (labels != IGNORED).nonzero().squeeze(1)
        num_learned = len(learned)
        # Filled up with a row that the loss ignores, so that few different shapes occur.
        places = torch.nn.functional.pad(learned, (0, _rounded(num_learned, LOGITS_STEP) - num_learned))
        targets = torch.nn.functional.pad(labels[learned], (0, len(places) - num_learned), value=IGNORED)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1].flatten(0, 1)[places],))
        try:
            outputs = model(**inputs)
        finally:
            hook.remove()
        total = torch.nn.functional.cross_entropy(
            outputs.logits.float(), targets, ignore_index=IGNORED, reduction="sum"
        )
        loss = total / (num_learned if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower learning_rate, "
                "or use precision=fp32"
            )
        return loss


class _Progress(TrainerCallback):
    """One bar on stderr per run, and metrics.jsonl."""

    def __init__(self, run: RunFolder, title: str) -> None:
        self._run = run
        self._title = title
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants to be read, not redrawn
        self._bar = tqdm(
            total=state.max_steps,
            desc=self._title,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=interval,
            maxinterval=interval,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        self._run.append_metrics({"step": state.global_step, **(logs or {})})
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.close()


def _save(config: TrainConfig, model: Any, base: Path, run: RunFolder) -> None:
    """Write aside, then rename: a folder called model or adapter is always whole."""
    target = run.model if config.finetuning == "full" else run.adapter
    aside = target.with_name(target.name + ".part")
    model.save_pretrained(aside, safe_serialization=True)
    if config.finetuning == "full":
        for name in TEXT_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, aside / name)
    else:
        (aside / "README.md").unlink(missing_ok=True)  # peft's empty model card
        _tidy_adapter_config(aside / "adapter_config.json", base_name(config))
    for file in aside.iterdir():
        file.chmod(0o644)  # weights are written for their owner only; a server may run as another user
    os.replace(aside, target)


def base_name(config: TrainConfig) -> str:
    """The base model's id for others: a hub id as it is, of a folder only its name."""
    folder = Path(config.model).expanduser()
    return folder.resolve().name if folder.is_dir() else config.model


def _tidy_adapter_config(path: Path, base: str) -> None:
    """No machine's path and no set order in it, so that equal adapters have equal revisions."""
    value = json.loads(path.read_text(encoding="utf-8"))
    value["base_model_name_or_path"] = base
    if isinstance(value.get("target_modules"), list):
        value["target_modules"] = sorted(value["target_modules"])
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
