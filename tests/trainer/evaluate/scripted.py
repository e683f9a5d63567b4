"""A candidate that says what the test tells it to, and items to ask it."""

from collections.abc import Callable, Sequence

from trainer.evaluate.candidate import Answer, AnswerLimits, Candidate, ItemFailed, Loglikelihood, Logprobs, Prompt
from trainer.evaluate.items import ChoiceItem, TextItem
from trainer.evaluate.results import CandidateInfo


class Scripted(Candidate):
    """`say` gives the answer to a prompt's shown text; `like` the log-probability of a continuation after it."""

    def __init__(
        self,
        say: Callable[[str], str] = lambda shown: "",
        like: Callable[[str, str], float] = lambda shown, continuation: -1.0,
        fingerprint: str = "f",
    ) -> None:
        self.info = CandidateInfo(name="scripted", kind="engine", model="scripted", fingerprint=fingerprint)
        self.max_in_flight = 3
        self.say, self.like = say, like
        self.prompts: list[Prompt] = []
        self.limits: AnswerLimits | None = None

    async def _answer(self, prompt: Prompt, limits: AnswerLimits) -> Answer:
        self.prompts.append(prompt)
        self.limits = limits
        text = self.say(prompt.shown)
        return Answer(text, "stop", 10, len(text) + 1, 0.5)

    async def _next_logprobs(self, prompt: Prompt, continuations: Sequence[str]) -> Logprobs:
        self.prompts.append(prompt)
        return Logprobs(tuple(self.like(prompt.shown, each) for each in continuations), 10)

    async def _loglikelihood(self, prompt: Prompt, reference: str) -> Loglikelihood:
        self.prompts.append(prompt)
        if reference == "refused":
            raise ItemFailed("context_length_exceeded: too long")
        return Loglikelihood(self.like(prompt.shown, reference), len(reference) + 1, 10)


def choice(name: str, right: str = "B", subject: str = "law", **fields: object) -> ChoiceItem:
    answers = tuple("ABCD".index(letter) for letter in right)
    given: dict[str, object] = {
        "item_id": name,
        "benchmark": "mmlu",
        "subject": subject,
        "question": f"{name}?",
        "options": ("red", "green", "blue", "grey"),
        "answers": answers,
        "is_multiple": len(answers) > 1,
    }
    return ChoiceItem(**{**given, **fields})  # type: ignore[arg-type]


def text(name: str, *references: str, **fields: object) -> TextItem:
    messages = ({"role": "user", "content": f"{name}?"},)
    given = {"item_id": name, "benchmark": "bench", "subject": "s", "messages": messages, "references": references}
    return TextItem(**{**given, **fields})  # type: ignore[arg-type]
