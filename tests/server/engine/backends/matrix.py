"""The proof that the hf backend writes what stock transformers and PEFT write: families x adapter methods x options.

Tests run it in parts. `python -m tests.server.engine.backends.matrix` runs all of it and writes docs/agreement.json,
from which `python -m docs.generate` makes the table of docs/engines.md.
"""

import datetime
import functools
import gc
import json
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.engine.backends.hf import HfBackend, HfOptions
from tests.server.engine.backends.agreement import Reference, assert_agrees, greedy
from tests.server.engine.backends.driver import Text, Texts, adapter_info, ask, collect, finish, run, submit
from tests.server.engine.backends.families import FAMILIES, Family, load
from tests.server.engine.backends.peft_adapters import METHODS, load_adapted, write_adapter

RESULTS = Path(__file__).resolve().parents[4] / "docs" / "agreement.json"
BASE = "base"
TWO_LORAS = "two LoRAs and base"
COLUMNS = (BASE, "LoRA", "rsLoRA", TWO_LORAS, *(method for method in METHODS if "LoRA" not in method))
NUM_TOKENS = 24
PROMPTS = [[(step * i + 11) % 390 + 1 for i in range(size)] for step, size in ((37, 30), (53, 4), (71, 45), (29, 17))]
QUESTION = [7, 301, 55]  # what a second turn adds to the first turn's text

# Options of the backend that must not change a text.
VARIANTS: dict[str, dict[str, Any]] = {
    "whole prompts, prefix reuse": {"prefill_chunk": 512, "prefix_cache": True},
    "chunks of 7, prefix reuse": {"prefill_chunk": 7, "prefix_cache": True},
    "whole prompts, no reuse": {"prefill_chunk": 512, "prefix_cache": False},
    "chunks of 7, no reuse": {"prefill_chunk": 7, "prefix_cache": False},
    "the model's own forward": {"prefill_chunk": 7, "prefix_cache": True, "forward": "generic"},
}


@dataclass(frozen=True)
class Tally:
    """Tokens by who wrote them, BASE or a method: those compared, and those that were there to compare."""

    num_compared: Counter[str] = field(default_factory=Counter)
    num_tokens: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.num_compared + other.num_compared, self.num_tokens + other.num_tokens)


class Subject:
    """One family's model folder, its adapters, and what the stock libraries write with them, each computed once."""

    def __init__(self, family: Family, root: Path, methods: Sequence[str] = tuple(METHODS)) -> None:
        self.family = family
        self.folder = family.write(root / "model")
        self.adapters: dict[str, Path] = {}
        self.refused: dict[str, str] = {}  # method -> what PEFT raised when asked for it
        for method in methods:
            try:
                self.adapters[method] = write_adapter(root / method, family, self.folder, method)
                self.reference(method, PROMPTS[0])
            except Warning:
                raise  # a slip in the configuration, not a refusal
            except Exception as error:  # whatever PEFT raises, it does not do this method for this family
                self.adapters.pop(method, None)
                self.refused[method] = f"{type(error).__name__}: {error}"

    @functools.cache  # noqa: B019 - a subject lives as long as the tests of its family
    def model(self, user: str) -> Any:
        return load(self.folder) if user == BASE else load_adapted(self.folder, self.adapters[user])

    def reference(self, user: str, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> Reference:
        whole = self._reference(user, tuple(prompt))
        return Reference(whole.token_ids[:num_tokens], whole.gaps[:num_tokens])

    @functools.cache  # noqa: B019
    def _reference(self, user: str, prompt: tuple[int, ...]) -> Reference:
        return greedy(self.model(user), prompt, NUM_TOKENS)

    @contextmanager
    def backend(self, variant: str) -> Iterator[HfBackend]:
        """A loaded backend with every adapter."""
        options = HfOptions(self.folder, "tiny", dtype="fp32", kv_cache_gib=0.05, max_num_seqs=12, **VARIANTS[variant])
        gc.freeze()  # closing a backend collects garbage; what was there before need not be searched each time
        try:
            backend = HfBackend(options)
            backend.load()
            for method, folder in self.adapters.items():
                backend.load_adapter(adapter_info(method), folder)
            yield backend
            backend.close()
        finally:
            gc.unfreeze()


FindSubject = Callable[[str], Subject]


def finder(new_folder: Callable[[str], Path], methods: Sequence[str] = tuple(METHODS)) -> FindSubject:
    """Subjects by their family's name, each built once, when it is first asked for."""

    @functools.cache
    def find(name: str) -> Subject:
        return Subject(FAMILIES[name], new_folder("family"), methods)

    return find


@dataclass(frozen=True)
class Row:
    """One sequence of a batch: whose it is, what it continues, and when it joins and leaves."""

    user: str
    prompt: Sequence[int]
    num_tokens: int = NUM_TOKENS
    joins_at: int = 0  # step

    def request(self, request_id: str) -> Any:
        adapter = None if self.user == BASE else adapter_info(self.user).id
        return ask(self.prompt, request_id, max_tokens=self.num_tokens, ignore_eos=True, adapter=adapter)


def play(backend: HfBackend, subject: Subject, rows: Sequence[Row]) -> Tally:
    """Run the rows in one batch, each joining at its step, and compare every one with its reference."""
    texts: Texts = {}
    for step in range(max(row.joins_at for row in rows) + 1):
        submit(backend, *(row.request(str(i)) for i, row in enumerate(rows) if row.joins_at == step))
        collect(backend.step(), texts)
    finish(backend, texts)
    return sum((check(subject, row, texts[str(i), 0]) for i, row in enumerate(rows)), Tally())


def check(subject: Subject, row: Row, text: Text) -> Tally:
    what = f"{subject.family.name}, {row.user}, prompt of {len(row.prompt)}, joined at {row.joins_at}"
    num_compared = assert_agrees(subject.reference(row.user, row.prompt, row.num_tokens), text.token_ids, what)
    return Tally(Counter({row.user: num_compared}), Counter({row.user: row.num_tokens}))


def base_alone(backend: HfBackend, subject: Subject) -> Tally:
    """One sequence at a time."""
    return sum((play(backend, subject, [Row(BASE, prompt)]) for prompt in PROMPTS), Tally())


def base_moving(backend: HfBackend, subject: Subject) -> Tally:
    """Eight sequences that join at different steps; early leavers make holes."""
    joins, lengths = (0, 0, 2, 3, 5, 5, 11, 12), (NUM_TOKENS, 7, NUM_TOKENS, 12, NUM_TOKENS, 1, NUM_TOKENS, 9)
    prompts = [*PROMPTS, *PROMPTS[::-1]]
    return play(backend, subject, [Row(BASE, *row) for row in zip(prompts, lengths, joins, strict=True)])


def two_loras_and_base(backend: HfBackend, subject: Subject) -> Tally:
    """Two adapters of different rank on different modules, and the base, in one batch."""
    users = (BASE, "LoRA", "rsLoRA", BASE, "rsLoRA", "LoRA")
    joins, lengths = (0, 0, 1, 4, 6, 9), (NUM_TOKENS, 9, NUM_TOKENS, 6, NUM_TOKENS, NUM_TOKENS)
    prompts = [PROMPTS[i] for i in (0, 3, 1, 1, 3, 0)]
    return play(backend, subject, [Row(*row) for row in zip(users, prompts, lengths, joins, strict=True)])


def every_method(backend: HfBackend, subject: Subject) -> Tally:
    """The base and each adapter in one batch, joining one after the other, with one and the same prompt."""
    users = [BASE, *subject.adapters, BASE]
    return play(backend, subject, [Row(user, PROMPTS[0], joins_at=i // 2) for i, user in enumerate(users)])


def second_turn(backend: HfBackend, subject: Subject, reuses: bool) -> Tally:
    """Each user's second prompt continues their own first text; everybody's first prompt is the same."""
    firsts = {user: Row(user, PROMPTS[0]) for user in (BASE, *subject.adapters)}
    told = run(backend, *(row.request(user) for user, row in firsts.items()))
    seconds = {
        user: replace(row, prompt=[*row.prompt, *told[user, 0].token_ids, *QUESTION]) for user, row in firsts.items()
    }
    answers = run(backend, *(row.request(user) for user, row in seconds.items()))
    tally = Tally()
    for user, row in seconds.items():
        saved = answers[user, 0].outputs[0].num_cached_tokens or 0
        assert saved >= len(PROMPTS[0]) if reuses else saved == 0, f"{user}: {saved} prompt tokens were reused"
        tally += check(subject, firsts[user], told[user, 0]) + check(subject, row, answers[user, 0])
    return tally


def reuses_prefixes(variant: str) -> bool:
    return bool(VARIANTS[variant]["prefix_cache"])


def run_family(subject: Subject) -> dict[str, dict[str, object]]:
    """Everything of one family, in all variants: column -> what came out. Raises AssertionError at a disagreement."""
    alone, mixed = Tally(), Tally()
    for variant in VARIANTS:
        with subject.backend(variant) as backend:
            alone += base_alone(backend, subject) + base_moving(backend, subject)
            alone += every_method(backend, subject) + second_turn(backend, subject, reuses_prefixes(variant))
            mixed += two_loras_and_base(backend, subject)
    cells: dict[str, dict[str, object]] = {name: {"peft_raised": text} for name, text in subject.refused.items()}
    for user in (BASE, *subject.adapters):
        cells[user] = {"num_compared": alone.num_compared[user], "num_tokens": alone.num_tokens[user]}
    cells[TWO_LORAS] = {"num_compared": mixed.num_compared.total(), "num_tokens": mixed.num_tokens.total()}
    return {column: cells[column] for column in COLUMNS}


def main() -> None:
    cells = {}
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as root:
            cells[name] = run_family(Subject(family, Path(root)))
        print(name, json.dumps(cells[name]), file=sys.stderr)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU, float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "variants": list(VARIANTS),
        "cells": cells,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
