"""Written answers beside references: by overlap (BLEU, ROUGE-L), or compared as they are (BBH)."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from trainer.evaluate.bootstrap import statistic_interval
from trainer.evaluate.candidate import Answer, AnswerLimits, Candidate, Message, Prompt
from trainer.evaluate.items import RefusedItem, TextItem
from trainer.evaluate.prompts import answered, by_subject
from trainer.evaluate.results import Interval, ItemScore
from trainer.evaluate.scores.corpus import bleu_counts, bleu_of_counts, corpus_bleu
from trainer.evaluate.scores.exact import exact_match
from trainer.evaluate.scores.text import TEXT_METRICS, TEXT_NOTES, text_scores
from trainer.evaluate.settings import EvalSettings
from trainer.evaluate.tasks.task import Emit, Task, answer_details, failed, is_plain, num_short

NEXT_QUESTION = ("\n\nQ:", "\nQ:", "\n\n\n")  # where a base model that was shown examples makes up the next one


class WrittenTask(Task[TextItem]):
    """Items that are answered in writing. A subclass says what an answer is worth."""

    plain_stop: tuple[str, ...] = ()

    def __init__(
        self, name: str, items: Sequence[TextItem], settings: EvalSettings, refused: Sequence[RefusedItem] = ()
    ) -> None:
        asked = sorted((item for item in items if not item.is_example), key=lambda item: item.subject)
        self._examples = by_subject(items) if settings.shots else {}
        super().__init__(name, asked, settings, refused, num_examples=len(items) - len(asked))

    @abstractmethod
    def score(self, item: TextItem, answer: Answer) -> dict[str, float]:
        """Of an answer that came, perhaps empty."""

    def details(self, item: TextItem, answer: Answer) -> dict[str, Any]:
        """What the score does not say."""
        return {}

    async def ask(self, candidate: Candidate, items: Sequence[TextItem], emit: Emit) -> None:
        plain = is_plain(self.settings, candidate)
        prompts = [self._prompt(item, plain) for item in items]
        stop = self.plain_stop if plain else ()
        limits = AnswerLimits(self.settings.max_tokens, self.settings.temperature, stop, self.settings.seed)

        def done(place: int, answer: Answer) -> None:
            emit(self._item_score(items[place], prompts[place], answer))

        await candidate.answers(prompts, limits, done)

    def _digested(self) -> Sequence[TextItem]:
        return [*self.items, *(example for own in self._examples.values() for example in own)]

    def _prompt(self, item: TextItem, plain: bool) -> Prompt:
        solved = self._examples.get(item.subject, [])[: self.settings.shots]
        group = f"{item.benchmark}/{item.subject}" if solved else ""
        system = self.settings.system or _system([item, *solved])
        if plain:
            blocks = [answered(plain_question(each), each.references[0]) for each in solved]
            return Prompt(text="\n\n".join([*filter(None, [system]), *blocks, plain_question(item)]), group=group)
        turns: list[Message] = [{"role": "system", "content": system}] if system else []
        for each in solved:
            turns += [*_spoken(each), {"role": "assistant", "content": each.references[0]}]
        return Prompt(messages=(*turns, *_spoken(item)), group=group)

    def _item_score(self, item: TextItem, prompt: Prompt, answer: Answer) -> ItemScore:
        reference = "\n".join(item.references[:1])
        if answer.error:
            zeros = dict.fromkeys(self.score(item, Answer()), 0.0)
            return failed(self.name, item, prompt.shown, answer.error, zeros, reference)
        return ItemScore(
            item_id=item.item_id,
            task=self.name,
            subject=item.subject,
            scores=self.score(item, answer),
            prompt=prompt.shown,
            answer=answer.text,
            reference=reference,
            details={**self.details(item, answer), **answer_details(answer)},
        )


class TextTask(WrittenTask):
    """Overlap with the references: BLEU-1 to 4, ROUGE-L, and the whole set's BLEU as sacrebleu computes it."""

    kind = "text"
    main_metric = "rouge_l"

    def score(self, item: TextItem, answer: Answer) -> dict[str, float]:
        return text_scores(answer.text, item.references)

    def metrics(self, scores: Sequence[ItemScore]) -> dict[str, Interval]:
        """The corpus' BLEU (`sacrebleu`) beside the means of the items' scores."""
        if not scores:
            return super().metrics(scores)
        counts = bleu_counts(*self._texts(scores))
        return {
            **super().metrics(scores),
            "sacrebleu": statistic_interval(counts, bleu_of_counts, seed=self.settings.seed),
        }

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        corpus = corpus_bleu(*self._texts(scores)) if scores else None
        return {**TEXT_NOTES, "sacrebleu": corpus.signature if corpus else "", "metrics": list(TEXT_METRICS)}

    def _texts(self, scores: Sequence[ItemScore]) -> tuple[list[str], list[Sequence[str]]]:
        references = {item.item_id: item.references for item in self.items}
        return [score.answer for score in scores], [references[score.item_id] for score in scores]


class BbhTask(WrittenTask):
    """Short answers that are right or wrong."""

    kind = "bbh"
    main_metric = "exact_match"
    plain_stop = NEXT_QUESTION

    def score(self, item: TextItem, answer: Answer) -> dict[str, float]:
        return {"exact_match": max(exact_match(answer.text, reference) for reference in item.references)}

    def notes(self, scores: Sequence[ItemScore]) -> dict[str, Any]:
        return {
            "shots": self.settings.shots,
            "num_short": num_short(self.items, self._examples, self.settings.shots),
            "metric": "exact match of the final answer",
        }


def plain_question(item: TextItem) -> str:
    """A conversation as text for a model without a template: BBH's own wording."""
    return "Q: " + "\n".join(message["content"] for message in _spoken(item)) + "\nA:"


def _system(items: Sequence[TextItem]) -> str:
    """The first system prompt among them; said once, at the beginning."""
    return next((m["content"] for item in items for m in item.messages if m["role"] == "system"), "")


def _spoken(item: TextItem) -> list[Message]:
    return [message for message in item.messages if message["role"] != "system"]
