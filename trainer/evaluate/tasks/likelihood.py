"""How likely a candidate finds the answers of held-out rows: the measure of small models, and of what was forgotten.

Counted as training's loss is: the tokens of the answer and the one that ends it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from trainer.data.read import read_rows
from trainer.data.rows import LedgerLine, Row
from trainer.evaluate.bootstrap import statistic_interval
from trainer.evaluate.candidate import Candidate, Loglikelihood, Prompt
from trainer.evaluate.items import ItemSet, RefusedItem, TextItem
from trainer.evaluate.prompts import delimiter
from trainer.evaluate.results import Interval, ItemScore
from trainer.evaluate.scores.likelihood import bits_per_byte, perplexities
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.task import Emit, Task, failed, is_plain
from trainer.evaluate.tasks.text import plain_question

NOTES = {
    "log_likelihood": "nats per token of the answer and of the token that ends it; the mean of the items' own means",
    "perplexity": "exp(-nats / tokens) of all items together",
    "bits_per_byte": "for comparing models with different tokenizers; the mean of the items' own",
}


class LikelihoodTask(Task[TextItem]):
    kind = "likelihood"
    main_metric = "log_likelihood"

    def __init__(
        self, name: str, items: Sequence[TextItem], settings: EvalSettings, refused: Sequence[RefusedItem] = ()
    ) -> None:
        """Raises ConfigError for a system prompt that would not be said before a text for pre-training."""
        if settings.system and not all(item.messages for item in items):
            raise ConfigError(f"--system: {name} has texts in which nobody is spoken to; leave it out")
        super().__init__(name, items, settings, refused)

    async def ask(self, candidate: Candidate, items: Sequence[TextItem], emit: Emit) -> None:
        plain = is_plain(self.settings, candidate)
        prompts = [self._prompt(item, plain) for item in items]
        references = [_continuation(prompt, item) for prompt, item in zip(prompts, items, strict=True)]

        def done(place: int, found: Loglikelihood) -> None:
            emit(self._item_score(items[place], prompts[place], found))

        await candidate.loglikelihoods(prompts, references, done)

    def metrics(self, scores: Sequence[ItemScore]) -> dict[str, Interval]:
        """`log_likelihood`: mean over items; `perplexity`: of all tokens, exp(-sum of nats / number of tokens)."""
        import numpy as np

        rows = np.array([[score.details["total"], score.details["num_tokens"]] for score in _read(scores)])
        found = super().metrics(scores)
        if len(rows):
            found["perplexity"] = statistic_interval(rows, perplexities, seed=self.settings.seed)
        return found

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        return {**NOTES, "num_tokens": sum(score.details["num_tokens"] for score in _read(scores))}

    def _prompt(self, item: TextItem, plain: bool) -> Prompt:
        if plain or not item.messages:
            return Prompt(text=plain_question(item) if item.messages else "")
        own = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        return Prompt(
            messages=(*own, *(message for message in item.messages if not own or message["role"] != "system"))
        )

    def _item_score(self, item: TextItem, prompt: Prompt, found: Loglikelihood) -> ItemScore:
        reference = item.references[0]
        error = found.error or _fault(found)
        if error:
            return failed(self.name, item, prompt.shown, error, {}, reference)
        return ItemScore(
            item_id=item.item_id,
            task=self.name,
            subject=item.subject,
            scores={
                "log_likelihood": found.total / found.num_tokens,
                "bits_per_byte": bits_per_byte(found.total, reference),
            },
            prompt=prompt.shown,
            reference=reference,
            details={
                "total": found.total,
                "num_tokens": found.num_tokens,
                "num_prompt_tokens": found.num_prompt_tokens,
            },
        )


def held_out(path: Path) -> ItemSet:
    """The rows of a training file as items: the last answer is the reference, what stands before it the question; of a
    text for pre-training all of it. Raises ConfigError and DataError."""
    found = ItemSet(path.stem)
    for row in read_rows([str(path)]):
        if isinstance(row, LedgerLine):
            if row.action == "dropped":
                found.refused.append(_refused(found.benchmark, row.source, row.line, row.code, row.detail))
        elif (fault := _unusable(row)) is not None:
            found.refused.append(_refused(found.benchmark, row.source, row.line, *fault))
        else:
            found.items.append(_item(found.benchmark, row, len(found.items)))
    return found


def _continuation(prompt: Prompt, item: TextItem) -> str:
    """The reference; in plain text with the space before it that a model expects behind "A:"."""
    reference = item.references[0]
    return delimiter(prompt.text, reference) + reference if prompt.text else reference


def _item(benchmark: str, row: Row, place: int) -> TextItem:
    messages = tuple({"role": m["role"], "content": m["content"]} for m in row.messages[:-1])
    reference = row.messages[-1]["content"] if row.messages else row.text
    return TextItem(
        item_id=f"{benchmark}-{place + 1}",
        benchmark=benchmark,
        subject=row.extra.get("category") or row.extra.get("department") or benchmark,
        messages=messages,
        references=(reference,),
        source=row.source,
        line=row.line,
    )


def _unusable(row: Row) -> tuple[str, str] | None:
    if row.chosen:
        return "preference-pair", "a pair of answers; give rows with one answer"
    if row.tools or any(message.get("tool_calls") for message in row.messages):
        return "tool-row", "tools cannot be asked through a chat template alone"
    return None


def _refused(benchmark: str, source: str, line: int, code: str, detail: str) -> RefusedItem:
    return RefusedItem(benchmark=benchmark, source=source, line=line, code=code, detail=detail)


def _read(scores: Sequence[ItemScore]) -> list[ItemScore]:
    return [score for score in scores if "error" not in score.details]


def _fault(found: Loglikelihood) -> str:
    if found.num_tokens == 0:
        return "no-tokens: the reference has none"
    return "" if math.isfinite(found.total) else "not-a-number: a log-probability"
