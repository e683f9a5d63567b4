"""One training system in one process: trains, and prints what it measured as one line of JSON.

    python -m benchmarks.train_systems SYSTEM JOB.json

Started by benchmarks.train_speed. All systems get the same model, rows, labels, optimizer and samples per step.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from server.store.home import Home
from server.text.render import ChatRenderer

SYSTEMS = ("qloop", "trainer", "trl")
IGNORED = -100
Job = dict[str, Any]


def main() -> None:
    name, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    meter = Meter(job)
    model = {"qloop": train_qloop, "trainer": train_trainer, "trl": train_trl}[name](job, meter)
    print(json.dumps({**meter.found, "final_loss": final_loss(model, job)}))


class Meter(TrainerCallback):
    """Time of all steps, and the highest memory above the loaded model and the optimizer's own."""

    def __init__(self, job: Job) -> None:
        self._tokens = sum(len(token_ids) for token_ids, _ in labelled(job)) * job["epochs"]
        self._base = 0
        self._began = 0.0
        self.found: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.sum()  # a mapped file counts once it is read
        ctypes.CDLL(None).malloc_trim(0)
        # AdamW keeps two numbers for each trained one; they come with the first step.
        optimizer = 8 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self._base = _status("VmRSS") + optimizer
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self._began
        self.found = {
            "tokens_per_s": round(self._tokens / seconds, 1),
            "seconds": round(seconds, 2),
            "steps": state.global_step,
            "peak_above_mb": round((_status("VmHWM") - self._base) / 2**20, 1),
        }


def train_qloop(job: Job, meter: Meter) -> Any:
    from trainer.config import TrainConfig
    from trainer.stages import text

    watchers = text.callbacks
    text.callbacks = lambda *given: [*watchers(*given), meter]
    kept: list[Any] = []
    run_training = text.run_training
    text.run_training = lambda trainer, session: (kept.append(trainer), run_training(trainer, session))
    from trainer.train import train

    config = TrainConfig(
        model_name_or_path=job["model"],
        train_file=(job["rows"],),
        finetuning_type=job["method"],
        lora_rank=8,
        lora_alpha=16,
        lora_dropout=0.0,
        num_train_epochs=float(job["epochs"]),
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=job["accumulation"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        bf16=job["bf16"],
        max_length=512,
        logging_steps=1000,
        save_strategy="no",
        plot_loss=False,
        disable_tqdm=True,
        seed=job["seed"],
    )
    train(config, Home(Path(job["home"])).create())
    return kept[0].model


def train_trainer(job: Job, meter: Meter) -> Any:
    rows = [{"input_ids": t, "labels": labels, "attention_mask": [1] * len(t)} for t, labels in labelled(job)]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer = Trainer(
        model=peer_model(job),
        args=TrainingArguments(**peer_arguments(job)),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED),
        callbacks=[meter],
    )
    trainer.train()
    return trainer.model


def train_trl(job: Job, meter: Meter) -> Any:
    from trl import SFTConfig, SFTTrainer

    renderer = ChatRenderer.load(Path(job["model"]))
    rows = [
        {"prompt": renderer.render_text(row["messages"][:-1]), "completion": row["messages"][-1]["content"]}
        for row in read_rows(job)
    ]
    trainer = SFTTrainer(
        model=peer_model(job),
        args=SFTConfig(**peer_arguments(job), gradient_checkpointing=False, max_length=512, dataset_num_proc=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[meter],
    )
    trainer.train()
    return trainer.model


def peer_model(job: Job) -> Any:
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    if job["method"] != "lora":
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(model, settings)


def peer_arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": str(Path(job["home"]) / "peer"),
        "num_train_epochs": job["epochs"],
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": job["accumulation"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "bf16": job["bf16"],
        "use_cpu": True,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
    }


def read_rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]


def labelled(job: Job) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row, learned where the answer is."""
    renderer = ChatRenderer.load(Path(job["model"]))
    made = []
    for row in read_rows(job):
        text = renderer.render_training(row["messages"])
        labels = [token if learn else IGNORED for token, learn in zip(text.token_ids, text.trained, strict=True)]
        made.append((text.token_ids, labels))
    return made


@torch.no_grad()
def final_loss(model: Any, job: Job) -> float:
    """Mean over all answers' tokens, row by row, the same way for every system."""
    model.eval()
    total, count = 0.0, 0
    for token_ids, labels in labelled(job)[: job["scored"]]:
        logits = model(input_ids=torch.tensor([token_ids])).logits[0, :-1].float()
        targets = torch.tensor(labels[1:])
        total += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    return round(total / count, 5)


def _status(name: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
