"""Multiple choice: by the log-probability of the letters, or by the answer that is written.

Questions with several right options are always answered in writing, and all their letters must be right: letters'
probabilities need a threshold, and there is no standard one.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer.evaluate.candidate import Answer, AnswerLimits, Candidate, Logprobs, Prompt
from trainer.evaluate.items import LETTERS, ChoiceItem, RefusedItem
from trainer.evaluate.prompts import Shown, Style, by_subject, chinese_subjects, choice_prompt, continuations, shown
from trainer.evaluate.results import ItemScore
from trainer.evaluate.scores.letters import letters_in
from trainer.evaluate.scores.position import position_bias
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.task import Emit, Task, answer_details, failed, is_plain, num_short

PLAIN_STOP = ("\n",)


class ChoiceTask(Task[ChoiceItem]):
    kind = "choice"
    main_metric = "accuracy"

    def __init__(
        self, name: str, items: Sequence[ChoiceItem], settings: EvalSettings, refused: Sequence[RefusedItem] = ()
    ) -> None:
        """`items`: with the examples of each subject, of which at most `settings.shots` are shown."""
        asked = sorted(
            (item for item in items if not item.is_example), key=lambda item: (item.subject, item.is_multiple)
        )
        self._examples = by_subject(items) if settings.shots else {}
        super().__init__(name, asked, settings, refused, num_examples=len(items) - len(asked))
        seed = settings.seed if settings.shuffle else None
        chinese = chinese_subjects(items)
        self._shown = {
            item.item_id: shown(item, seed, is_chinese=(item.benchmark, item.subject) in chinese) for item in self.items
        }

    async def ask(self, candidate: Candidate, items: Sequence[ChoiceItem], emit: Emit) -> None:
        written = [item for item in items if self._is_written(item)]
        scored = [item for item in items if not self._is_written(item)]
        await self._ask_letters(candidate, scored, emit)
        await self._ask_answers(candidate, written, emit)

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        read = [score for score in scores if "error" not in score.details]
        written = [score for score in read if "logprobs" not in score.details]
        return {
            "shots": self.settings.shots,
            "num_short": num_short(self.items, self._examples, self.settings.shots),
            "by": self.settings.by,
            "num_written": len(written),
            "num_unreadable": sum(not score.details["chosen"] for score in written),
            "num_multiple": sum(item.is_multiple for item in self.items),
            "accuracy_by_subject": statistics.fmean(subject.scores["accuracy"] for subject in self.subjects(scores)),
            "shuffled": self.settings.shuffle,
            "position_bias": place_notes(read),
        }

    def _digested(self) -> Sequence[ChoiceItem]:
        return [*self.items, *(example for own in self._examples.values() for example in own)]

    def _is_written(self, item: ChoiceItem) -> bool:
        return item.is_multiple or self.settings.by == "answer"

    def _prompt(self, item: ChoiceItem, style: Style) -> Prompt:
        return choice_prompt(self._shown[item.item_id], self._examples.get(item.subject, ()), style)

    def _style(self, candidate: Candidate, is_written: bool) -> Style:
        return Style(self.settings.shots, is_plain(self.settings, candidate), is_written, self.settings.system)

    async def _ask_letters(self, candidate: Candidate, items: Sequence[ChoiceItem], emit: Emit) -> None:
        style = self._style(candidate, is_written=False)
        prompts = [self._prompt(item, style) for item in items]
        letters = [continuations(self._shown[item.item_id], style) for item in items]

        def done(place: int, found: Logprobs) -> None:
            emit(self._letters_score(self._shown[items[place].item_id], prompts[place], found))

        await candidate.next_logprobs(prompts, letters, done)

    async def _ask_answers(self, candidate: Candidate, items: Sequence[ChoiceItem], emit: Emit) -> None:
        style = self._style(candidate, is_written=True)
        prompts = [self._prompt(item, style) for item in items]
        stop = PLAIN_STOP if style.is_plain else ()
        limits = AnswerLimits(self.settings.max_tokens, self.settings.temperature, stop, self.settings.seed)

        def done(place: int, answer: Answer) -> None:
            emit(self._answer_score(self._shown[items[place].item_id], prompts[place], answer))

        await candidate.answers(prompts, limits, done)

    def _letters_score(self, question: Shown, prompt: Prompt, found: Logprobs) -> ItemScore:
        error = found.error or ("" if all(map(math.isfinite, found.values)) else "not-a-number: a log-probability")
        if error:
            return failed(self.name, question.item, prompt.shown, error, {"accuracy": 0.0}, question.answers)
        letters = LETTERS[: len(found.values)]
        chosen = letters[max(range(len(letters)), key=lambda place: found.values[place])]
        right = found.values[letters.index(question.answers)]
        details = {
            "logprobs": dict(zip(letters, found.values, strict=True)),
            "num_prompt_tokens": found.num_prompt_tokens,
        }
        scores = {"accuracy": float(chosen == question.answers), "log_likelihood": right}
        return self._score(question, prompt, scores, chosen, chosen, details)

    def _answer_score(self, question: Shown, prompt: Prompt, answer: Answer) -> ItemScore:
        if answer.error:
            return failed(self.name, question.item, prompt.shown, answer.error, {"accuracy": 0.0}, question.answers)
        chosen = letters_in(answer.text, len(question.options), question.options) or ""
        details = answer_details(answer)
        return self._score(
            question, prompt, {"accuracy": float(chosen == question.answers)}, answer.text, chosen, details
        )

    def _score(
        self,
        question: Shown,
        prompt: Prompt,
        scores: dict[str, float],
        answer: str,
        chosen: str,
        details: dict[str, Any],
    ) -> ItemScore:
        order = {"order": "".join(LETTERS[index] for index in question.order)} if self.settings.shuffle else {}
        return ItemScore(
            item_id=question.item.item_id,
            task=self.name,
            subject=question.item.subject,
            scores=scores,
            prompt=prompt.shown,
            answer=answer,
            reference=question.answers,
            details={"chosen": chosen, **order, **details},
        )


def place_notes(scores: Sequence[ItemScore]) -> dict[str, Any]:
    """How the places of the options were chosen, over questions with one right option.

    Beside `scores.position`: `recall`, how often a letter was chosen where it was right, and `spread`, the standard
    deviation of the recalls, 0 for a candidate whom places do not sway (Zheng et al. 2024, arXiv 2309.03882).
    """
    single = [score for score in scores if len(score.reference) == 1]
    if not single:
        return {}
    found = asdict(position_bias([score.details["chosen"] for score in single], [score.reference for score in single]))
    recall = {
        letter: statistics.fmean(score.scores["accuracy"] for score in single if score.reference == letter)
        for letter in sorted({score.reference for score in single})
    }
    return {**found, "recall": recall, "spread": statistics.pstdev(recall.values())}
