"""What every task has: items, a way to ask them, and figures from the items' scores. Knows no files."""

import hashlib
import json
import random
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Generic, Literal, TypeVar

from server.errors import ConfigError
from trainer.evaluate.bootstrap import interval
from trainer.evaluate.candidate import Answer, Candidate
from trainer.evaluate.items import Item, RefusedItem, TextItem
from trainer.evaluate.results import Interval, ItemScore, SubjectScore, TaskResult
from trainer.evaluate.scores.lengths import GivenAnswer, answer_statistics
from trainer.evaluate.settings import EvalSettings

AnyItem = TypeVar("AnyItem", bound=Item)
Emit = Callable[[ItemScore], None]


class Task(ABC, Generic[AnyItem]):
    """`items` are those that are scored, in the order in which they are asked: neighbours share their examples."""

    kind: str
    main_metric: str

    def __init__(
        self,
        name: str,
        items: Sequence[AnyItem],
        settings: EvalSettings,
        refused: Sequence[RefusedItem] = (),
        *,
        num_examples: int = 0,
    ) -> None:
        self.name = name
        self.settings = settings
        self.items = _drawn(items, settings)
        self.num_read = len(items) + num_examples + len(refused)
        self.num_examples = num_examples
        self.refused = Counter(each.code for each in refused)

    def count_refused(self, codes: Mapping[str, int]) -> None:
        """Items of files that no task has, read beside its own."""
        self.refused.update(codes)
        self.num_read += sum(codes.values())

    @property
    def digest(self) -> str:
        """Of everything that is asked: another file, another order or another limit gives another one."""
        rows = [self._content(item) for item in self._digested()]
        text = json.dumps([self.kind, rows], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @abstractmethod
    async def ask(self, candidate: Candidate, items: Sequence[AnyItem], emit: Emit) -> None:
        """Score `items`, each as soon as its answer is there. Raises CandidateLost."""

    def result(self, scores: Sequence[ItemScore]) -> TaskResult:
        """`scores`: one for each item."""
        return TaskResult(
            task=self.name,
            main_metric=self.main_metric,
            metrics=self.metrics(scores),
            subjects=self.subjects(scores),
            num_items=self.num_read,
            num_scored=len(scores),
            num_examples=self.num_examples,
            refused=dict(self.refused),
            notes={**self.notes(scores), **answer_notes(scores), **error_notes(scores)},
        )

    def style(self, candidate: Candidate) -> Literal["chat", "plain"]:
        """In which `candidate` is asked. Raises as `is_plain`."""
        # Texts for pre-training have nobody who speaks, whatever the candidate has.
        are_texts = all(isinstance(item, TextItem) and not item.messages for item in self.items)
        return "plain" if is_plain(self.settings, candidate) or are_texts else "chat"

    def metrics(self, scores: Sequence[ItemScore]) -> dict[str, Interval]:
        """The mean of each score over the items that have it, and its interval."""
        return {name: interval(values, seed=self.settings.seed) for name, values in columns(scores).items()}

    def subjects(self, scores: Sequence[ItemScore]) -> tuple[SubjectScore, ...]:
        groups: dict[str, list[ItemScore]] = {}
        for score in scores:
            groups.setdefault(score.subject, []).append(score)
        return tuple(
            SubjectScore(
                subject=name, num_items=len(own), scores={k: statistics.fmean(v) for k, v in columns(own).items()}
            )
            for name, own in groups.items()
        )

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        """What a reader of the figures must know beside them."""
        return {}

    def _digested(self) -> Sequence[AnyItem]:
        return self.items

    def _content(self, item: AnyItem) -> dict[str, Any]:
        """What decides its answer and its score, wherever it was read."""
        return asdict(item) | {"source": "", "line": 0}


def is_plain(settings: EvalSettings, candidate: Candidate) -> bool:
    """Chat where the candidate has a template, unless the settings say otherwise. Raises ConfigError for a system
    prompt that would not be said."""
    plain = settings.style == "plain" or (settings.style == "auto" and not candidate.has_template)
    if plain and settings.system:
        raise ConfigError("system: plain text has no system prompt; leave it out, or take a model with a chat template")
    return plain


def answer_details(answer: Answer) -> dict[str, Any]:
    return {
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_tokens": answer.num_tokens,
        "seconds": round(answer.seconds, 4),
    }


def _drawn(items: Sequence[AnyItem], settings: EvalSettings) -> list[AnyItem]:
    """At most `limit` of them, drawn by the seed from all subjects, in their order."""
    if settings.limit is None or len(items) <= settings.limit:
        return list(items)
    places = random.Random(settings.seed).sample(range(len(items)), settings.limit)
    return [items[place] for place in sorted(places)]


def columns(scores: Sequence[ItemScore]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.scores.items():
            found.setdefault(name, []).append(value)
    return found


def num_short(items: Sequence[Item], examples: Mapping[str, Sequence[Item]], shots: int) -> int:
    """Items for which fewer examples were found than were asked for."""
    return sum(len(examples.get(item.subject, ())) < shots for item in items)


def failed(name: str, item: Item, prompt: str, error: str, scores: Mapping[str, float], reference: str) -> ItemScore:
    """An item that could not be asked: what is not answered is not right."""
    return ItemScore(
        item_id=item.item_id,
        task=name,
        subject=item.subject,
        scores=dict(scores),
        prompt=prompt,
        reference=reference,
        details={"error": error},
    )


def answer_notes(scores: Sequence[ItemScore]) -> dict[str, Any]:
    """Lengths and endings of what was written."""
    written = [score for score in scores if "finish_reason" in score.details]
    if not written:
        return {}
    given = [
        GivenAnswer(
            text=score.answer,
            num_tokens=score.details["num_tokens"],
            finish_reason=score.details["finish_reason"],
        )
        for score in written
    ]
    return {"answers": answer_statistics(given)}


def error_notes(scores: Sequence[ItemScore]) -> dict[str, Any]:
    errors = Counter(score.error_code for score in scores if score.error_code)
    return {"num_errors": errors.total(), "errors": dict(errors)} if errors else {}
