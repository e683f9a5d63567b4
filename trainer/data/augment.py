"""More rows from rows, written by a model: other words for a question, or answers to it. Knows no server and no files.

Every new row is marked: `generated` says which part is, `generated_by` by which model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainer.data.ask import AnswerRefused, Messages
from trainer.data.rows import Message, Row
from trainer.data.texts import normalised

What = Literal["questions", "answers"]
_ORDERS = {
    "questions": (
        "You rewrite questions. The user sends one message meant for somebody else; do not answer it. Write {count} "
        "other ways to ask exactly the same, in the language of the message, as different people would put it; keep "
        "every fact, number and name. "
    ),
    "answers": (
        "You answer questions for a training set. Write {count} good, complete and truthful answers to the user's last "
        "message, in its language, each worded in its own way. "
    ),
}
_FORM = 'Answer with one JSON object and nothing else: {{"{what}": [{count} strings]}}.'


@dataclass(frozen=True)
class Augmentation:
    """What is made of each row, and how many."""

    what: What
    count: int
    model: str
    hint: str = ""

    def prompt(self, row: Row) -> Messages:
        order = (_ORDERS[self.what] + _FORM).format(count=self.count, what=self.what)
        system = {"role": "system", "content": f"{order} {self.hint}".strip()}
        if self.what == "questions":
            return [system, {"role": "user", "content": str(row.messages[_asked(row)]["content"])}]
        turns = row.messages[: _asked(row) + 1]
        return [system, *({"role": m["role"], "content": str(m["content"])} for m in turns if m["role"] != "system")]

    def check(self, row: Row, value: Any) -> list[str]:
        """The new texts. Raises AnswerRefused unless there are as many as asked for, all different."""
        texts = value.get(self.what)
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise AnswerRefused(f'"{self.what}" is not a list of strings with text')
        known = {normalised(str(row.messages[_asked(row)]["content"]))}
        different = {normalised(text): text.strip() for text in texts if normalised(text) not in known}
        if len(different) < self.count:
            raise AnswerRefused(f"{len(different)} different new {self.what}, {self.count} are wanted")
        return list(different.values())[: self.count]

    def new_rows(self, row: Row, texts: list[str]) -> Iterator[Row]:
        at = _asked(row)
        mark = {"generated": self.what.removesuffix("s"), "generated_by": self.model}
        for text in texts:
            if self.what == "questions":
                messages = (*row.messages[:at], {**row.messages[at], "content": text}, *row.messages[at + 1 :])
            else:
                answer: Message = {"role": "assistant", "content": text}
                messages = (*row.messages[: at + 1], answer)
            yield replace(row, messages=messages, extra={**row.extra, **mark}, notes=())


def _asked(row: Row) -> int:
    """Position of the question that the row's last answer is about."""
    return max(number for number, message in enumerate(row.messages) if message["role"] == "user")
