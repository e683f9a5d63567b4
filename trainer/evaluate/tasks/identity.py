"""Whether the candidate says who it is: the configured name on every way to ask, ended by the stop token."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from server.errors import ConfigError
from trainer.evaluate.candidate import Answer
from trainer.evaluate.items import TextItem
from trainer.evaluate.results import ItemScore
from trainer.evaluate.scores.identity import identity_questions, identity_score
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.text import WrittenTask


class IdentityTask(WrittenTask):
    kind = "identity"
    main_metric = "passed"

    def __init__(self, identity: str, settings: EvalSettings) -> None:
        """`identity`: the name, or `name/author`; a name that is the author's own is no foreign one."""
        self.identity, _, self.author = identity.partition("/")
        if not self.identity.strip():
            raise ConfigError("--task identity=NAME: the name that the model is to give is missing")
        items = [
            TextItem(
                item_id=question.question_id,
                benchmark="identity",
                subject=question.language,
                messages=({"role": "user", "content": question.text},),
                # The author decides what passes, too: with another one it is another evaluation.
                references=tuple(filter(None, (self.identity, self.author))),
            )
            for question in identity_questions()
        ]
        super().__init__("identity", items, settings)

    def score(self, item: TextItem, answer: Answer) -> dict[str, float]:
        return {"passed": float(self._judged(answer).passed)}

    def details(self, item: TextItem, answer: Answer) -> dict[str, Any]:
        found = self._judged(answer)
        return {"failed": list(found.failed), "foreign": list(found.foreign)}

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        broken = Counter(rule for score in scores for rule in score.details.get("failed", ()))
        return {"name": self.identity, "author": self.author, "failed": dict(broken)}

    def _judged(self, answer: Answer) -> Any:
        return identity_score(answer.text, self.identity, answer.finish_reason, author=self.author)
