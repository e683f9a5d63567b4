"""Builds the demo model and adapter in a home folder: tokenizer, pt, sft, LoRA, publish. Cached by content.

The cache key covers the corpus, the recipe and the trainer's own code, so an edit of any of them builds anew.
"""

import fcntl
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from server.store.hashes import file_hash, text_hash, weights_hash, write_json
from server.store.home import Home
from server.store.registry import Registry, RegistryError
from trainer.config import TrainConfig
from trainer.demo.blank_model import Shape, write_blank_model
from trainer.demo.conversations import CORPUS, Corpus, adapter_pairs, write_conversations, write_texts

MODEL_NAME = "qwen2-demo"
ADAPTER_NAME = "qwen2-demo-xiaozhi"
STAMP_NAME = "demo.json"
MAX_THREADS = 4  # more only wait for each other on matrices this small
TRAINER_CODE = Path(__file__).parent.parent
# What decides the result; the rest of the trainer may change without a new build.
CODE_FILES = (
    *("options/arguments.py", "examples/dataset.py", "examples/labels.py", "examples/truncate.py"),
    *("steps/batches.py", "steps/loop.py", "steps/loss.py", "steps/packing.py", "stages/text.py", "train.py"),
    *("demo/blank_model.py", "demo/conversations.py", "demo/build.py"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the demo's weights, beside corpus and code."""

    shape: Shape = field(default_factory=Shape)
    seed: int = 7
    pt_epochs: float = 2.0
    pt_length: int = 128
    sft_rounds: int = 14  # different conversations made of the same pairs, each trained once
    adapter_rounds: int = 15
    adapter_rank: int = 32
    learning_rate: float = 2e-3
    adapter_learning_rate: float = 4e-3
    adapter_batch_size: int = 5
    batch_size: int = 10


def build_demo(home: Home, *, force: bool = False, recipe: Recipe | None = None, corpus_folder: Path = CORPUS) -> bool:
    """Make the demo unless it is up to date; True if anything was built. One build per home at a time."""
    recipe = recipe or Recipe()
    home.create()
    with _lock(home):
        key = cache_key(recipe, corpus_folder)
        if not force and is_current(home, key):
            return False
        with tempfile.TemporaryDirectory(prefix="demo-", dir=home.cache) as work:
            _build(home, Path(work), recipe, corpus_folder, key)
    return True


def cache_key(recipe: Recipe, corpus_folder: Path) -> str:
    """sha256 over recipe, corpus and the code that decides the result."""
    parts = [json.dumps(asdict(recipe), sort_keys=True)]
    parts += [f"{path.name} {file_hash(path)}" for path in sorted(corpus_folder.glob("*.jsonl"))]
    parts += [f"{name} {file_hash(TRAINER_CODE / name)}" for name in CODE_FILES]
    return text_hash("\n".join(parts))


def is_current(home: Home, key: str) -> bool:
    """True if model and adapter of this key are in place and belong together."""
    model = home.models / MODEL_NAME
    try:
        stamp = json.loads((model / STAMP_NAME).read_text(encoding="utf-8"))
        entry = Registry(home.adapters).get(ADAPTER_NAME, stamp["revision"])
    except (OSError, ValueError, KeyError, TypeError, RegistryError):
        return False
    has_weights = (model / "model.safetensors").is_file() and entry.is_current
    return bool(stamp.get("key") == key and has_weights)


def _build(home: Home, work: Path, recipe: Recipe, corpus_folder: Path, key: str) -> None:
    import torch

    from trainer.publish import publish
    from trainer.results.save import replace_folder
    from trainer.train import train

    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    corpus = Corpus.load(corpus_folder)
    inner = Home(work)  # the demo's own runs do not clutter the user's list
    _say("1/5 tokenizer")
    write_blank_model(work / "blank", corpus.all_texts(), recipe.shape)
    write_texts(work / "pt.jsonl", corpus)
    write_conversations(work / "sft.jsonl", (*corpus.base, *corpus.often), recipe.sft_rounds, recipe.seed)
    write_conversations(work / "adapter.jsonl", adapter_pairs(corpus), recipe.adapter_rounds, recipe.seed)

    first = _config(
        recipe,
        work / "blank",
        work / "pt.jsonl",
        stage="pt",
        finetuning_type="full",
        from_scratch=True,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=recipe.pt_epochs,
        max_length=recipe.pt_length,
    )
    raw = train(first, inner, title="2/5 pre-training")
    second = _config(
        recipe,
        raw.model,
        work / "sft.jsonl",
        finetuning_type="full",
        num_train_epochs=1.0,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        max_length=recipe.shape.max_length,
    )
    tuned = train(second, inner, title="3/5 fine-tuning")
    model = work / MODEL_NAME
    tuned.model.rename(model)
    rank = recipe.adapter_rank
    third = _config(
        recipe,
        model,
        work / "adapter.jsonl",
        num_train_epochs=1.0,
        learning_rate=recipe.adapter_learning_rate,
        per_device_train_batch_size=recipe.adapter_batch_size,
        lora_rank=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        max_length=recipe.shape.max_length,
    )
    adapter = train(third, inner, title="4/5 adapter")
    _say("5/5 publish")
    replace_folder(model, home.models / MODEL_NAME)
    entry = publish(adapter.path, ADAPTER_NAME, home, base=str(home.models / MODEL_NAME))
    write_json(home.models / MODEL_NAME / STAMP_NAME, {"key": key, "revision": entry.revision})
    _remove_orphans(home)


def _config(recipe: Recipe, model: Path, data: Path, **options: Any) -> TrainConfig:
    return TrainConfig(
        model_name_or_path=str(model),
        train_file=(str(data),),
        run_id=data.stem,
        gradient_accumulation_steps=1,
        warmup_steps=0.05,
        adam_beta2=0.98,
        bf16=_bf16(),
        attention="auto",
        seed=recipe.seed,
        save_strategy="no",
        plot_loss=False,
        **options,
    )


def _bf16() -> bool | None:
    """bf16 halves the time where the processor multiplies it, and is emulated slowly where it does not."""
    import torch

    return None if torch.cuda.is_available() else bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _remove_orphans(home: Home) -> None:
    """Earlier demo adapters fit weights that are gone."""
    registry = Registry(home.adapters)
    base_hash = weights_hash(home.models / MODEL_NAME, cache_path=home.hash_cache)
    for entry in registry.entries():
        if entry.name == ADAPTER_NAME and not entry.is_current and entry.card.base_weights_hash != base_hash:
            registry.remove(entry.name, entry.revision)


@contextmanager
def _lock(home: Home) -> Iterator[None]:
    with (home.cache / "demo.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
