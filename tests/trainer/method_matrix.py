"""The proof that what one method makes of one family can be saved, loaded again and served: methods x families.

Tests run it in parts. `python -m tests.trainer.method_matrix` runs all of it and writes docs/methods.json, from which
`python -m docs.generate` makes the table of docs/training.md.
"""

import datetime
import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from server.engine.backends.hf import HfBackend, HfOptions
from server.errors import ConfigError
from server.store.home import Home
from server.store.servability import servable
from server.text.render import ChatRenderer
from tests.server.engine.backends.agreement import assert_agrees, greedy
from tests.server.engine.backends.driver import adapter_info, ask, run
from tests.trainer.families import FAMILIES, Family
from trainer.config import TrainConfig
from trainer.methods.base_model import load_base
from trainer.methods.plan import base_bits
from trainer.results.merge import merge
from trainer.train import train

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "methods.json"
NUM_TOKENS = 12
PROMPT = [(37 * i + 11) % 390 + 1 for i in range(20)]
TEXT = "你好，世界。我最近总是睡不着，怎么办？ The user asks a question and the assistant answers it."
LEARNING_RATES = {"prompt tuning": 0.3, "P-tuning": 0.01, "P-tuning v2": 0.3, "IA3": 0.3, "full": 0.003, "freeze": 0.01}

# Column -> options of the run.
METHODS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze"},
    "LoRA": {"finetuning_type": "lora"},
    "rsLoRA": {"finetuning_type": "lora", "use_rslora": True},
    "DoRA": {"finetuning_type": "lora", "use_dora": True},
    "PiSSA": {"finetuning_type": "lora", "lora_init": "pissa"},
    "QLoRA nf4": {"finetuning_type": "qlora"},
    "QLoRA int8": {"finetuning_type": "qlora", "quantization_bit": 8},
    "P-tuning v2": {"finetuning_type": "ptuning_v2"},
    "P-tuning": {"finetuning_type": "p_tuning"},
    "prompt tuning": {"finetuning_type": "prompt"},
    "IA3": {"finetuning_type": "ia3"},
}


@dataclass(frozen=True)
class Cell:
    """`engines` serve it as it is; none: merged first. `reload_gap`: of the loss, before saving and after loading."""

    engines: tuple[str, ...] = ()
    first_loss: float = 0.0
    last_loss: float = 0.0
    reload_gap: float = 0.0
    num_compared: int = 0
    num_tokens: int = NUM_TOKENS
    refused: str = ""


def config_of(base: Path, options: dict[str, Any], is_remote: bool = False) -> TrainConfig:
    shared = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "pre_seq_len": 5, "freeze_trainable_layers": 1}
    required = {"model_name_or_path": str(base), "train_file": ("data.jsonl",), "trust_remote_code": is_remote}
    return TrainConfig(**{**required, **shared, **options})


def run_options(method: str, text: Path) -> dict[str, Any]:
    """Four steps on one text, evaluated on the same text after the last of them."""
    return {
        "stage": "pt",
        "train_file": (str(text),),
        "val_file": (str(text),),
        "run_id": method.replace(" ", "-"),
        "resume": "never",
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATES.get(method, 0.02),
        "lr_scheduler_type": "constant",
        "warmup_steps": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 4.0,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
        "max_length": 64,
    }


class Subject:
    """One family's base folder, and a home for its runs."""

    def __init__(self, family: Family, root: Path) -> None:
        self.family = family
        self.root = root
        self.home = Home(root / "home")
        self.base = family.write(root / "base")
        self.base_config = json.loads((self.base / "config.json").read_text())

    def load(self, folder: Path | None = None, bits: int = 0) -> Any:
        return load_base(
            folder or self.base, dtype=torch.float32, bits=bits, trust_remote_code=self.family.is_remote
        ).eval()

    def cell(self, method: str) -> Cell:
        """Train by the real `train`, load what it left, serve it. Raises AssertionError where one does not hold."""
        text = self.root / "text.jsonl"
        text.write_text(json.dumps({"text": TEXT}) + "\n", encoding="utf-8")
        config = config_of(self.base, {**METHODS[method], **run_options(method, text)}, self.family.is_remote)
        try:
            finished = train(config, self.home)
        except ConfigError as error:
            return Cell(refused=str(error))
        last = json.loads((finished.path / "run.json").read_text())["eval_loss"]
        is_adapter = finished.adapter.is_dir()
        target = finished.adapter if is_adapter else finished.model
        first = self.text_loss(self.load())
        assert last < first - 0.1, f"{method} learned nothing: {first:.3f} to {last:.3f}"
        bits = base_bits(config)
        reload_gap = abs(self.text_loss(self.reloaded(target, is_adapter, bits)) - last)
        engines, num_compared = self.served(target, is_adapter)
        if self.family.is_remote:
            engines = tuple(name for name in engines if name != "vllm")  # it runs no code that lies in a folder
        return Cell(engines, first, last, reload_gap, num_compared)

    def text_loss(self, model: Any) -> float:
        """Per token of TEXT and the id that ends it."""
        eos = self.base_config["pad_token_id"]
        ids = torch.tensor([[*ChatRenderer.load(self.base).tokenizer.encode_plain(TEXT), eos]])
        labels = ids.clone()
        labels[:, 0] = -100  # behind virtual tokens the first one could be predicted, too
        with torch.no_grad():
            return float(model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss)

    def reloaded(self, target: Path, is_adapter: bool, bits: int = 0) -> Any:
        if not is_adapter:
            return self.load(target)
        return PeftModel.from_pretrained(self.load(bits=bits), str(target)).eval()

    def served(self, target: Path, is_adapter: bool) -> tuple[tuple[str, ...], int]:
        """Greedy text of our engine beside that of the stock libraries on the float32 base."""
        reference = greedy(self.reloaded(target, is_adapter), PROMPT, NUM_TOKENS)
        if not is_adapter:
            return ("hf", "vllm"), assert_agrees(reference, self.generate(target))
        engines = servable(
            json.loads((target / "adapter_config.json").read_text()), self.base_config["model_type"]
        ).backends
        if "hf" in engines:
            return engines, assert_agrees(reference, self.generate(self.base, target))
        merged = target.with_name("merged")
        merge(target, merged, self.home, base=str(self.base), trust=self.family.is_remote)
        return engines, assert_agrees(reference, self.generate(merged))

    def generate(self, folder: Path, adapter: Path | None = None) -> list[int]:
        trust = self.family.is_remote
        options = HfOptions(folder, "t", dtype="fp32", kv_cache_gib=0.05, prefill_chunk=32, trust_remote_code=trust)
        backend = HfBackend(options)
        backend.load()
        asked: dict[str, Any] = {}
        if adapter is not None:
            backend.load_adapter(adapter_info("x"), adapter)
            asked["adapter"] = adapter_info("x").id
        text = run(backend, ask(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, **asked))["a", 0]
        backend.close()
        return text.token_ids


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[(17 * i + 5 * row) % 250 + 1 for i in range(24)] for row in range(2)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@torch.no_grad()
def loss_of(model: Any) -> float:
    model.eval()
    return float(model(**batch()).loss)


def train_steps(model: Any, learning_rate: float, count: int = 4) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    model.train()
    for _ in range(count):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    cells: dict[str, dict[str, object]] = {}
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as root:
            subject = Subject(family, Path(root))
            cells[name] = {method: asdict(subject.cell(method)) for method in METHODS}
        print(name, json.dumps(cells[name]), file=sys.stderr)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU, float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "cells": cells,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
