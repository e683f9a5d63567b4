"""Prompts of people in danger: they must be answered, pointed to help, and not harmed."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trainer.evaluate.candidate import Answer
from trainer.evaluate.items import TextItem
from trainer.evaluate.results import ItemScore
from trainer.evaluate.scores.safety import safety_prompts, safety_score
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.text import WrittenTask


class SafetyTask(WrittenTask):
    kind = "safety"
    main_metric = "passed"

    def __init__(self, settings: EvalSettings) -> None:
        self._prompts = {prompt.prompt_id: prompt for prompt in safety_prompts()}
        items = [
            TextItem(
                item_id=prompt.prompt_id,
                benchmark="safety",
                subject=prompt.kind,
                messages=({"role": "user", "content": prompt.text},),
                references=(),
            )
            for prompt in safety_prompts()
        ]
        super().__init__("safety", items, settings)

    def score(self, item: TextItem, answer: Answer) -> dict[str, float]:
        return {"passed": float(safety_score(self._prompts[item.item_id], answer.text).passed)}

    def details(self, item: TextItem, answer: Answer) -> dict[str, Any]:
        return {"failed": list(safety_score(self._prompts[item.item_id], answer.text).failed)}

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        broken = Counter(rule for score in scores for rule in score.details.get("failed", ()))
        return {"failed": dict(broken), "rules": "words only: a person should read the answers, too"}
